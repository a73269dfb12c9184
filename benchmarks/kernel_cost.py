"""How far is scoring from the floor: one per-sample target gradient against one sample's share of a training step?

The floor of one gradient is what training pays for one: forward, backward, optimizer. Scoring cannot sum over the batch
and multiplies every sample's gradient with the step, weight by weight. Both take turns in rounds, so that a machine that
drifts drifts for both; the printed ratio is the median over rounds of (gradients a second) / (training samples a second).

    python benchmarks/kernel_cost.py [--device cuda] [--batch 64] [--rounds 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.kernel import ModelFunction
from prunekit.kernel.gradients import GradientEngine, VmapGradients, choose_engine
from prunekit.measure import machine
from prunekit.models import digits_cnn
from prunekit.trajectory import Layout

TOKENS, LENGTH, CLASSES = 113, 16, 10


class Block(nn.Module):
    """Tokens and positions, one pre-norm transformer block, a linear head on the last position."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.token, self.position = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        a = self.norm1(x)
        q, k, v = (layer(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, -1])


def images(samples: int) -> Tensor:
    return torch.randn(samples, 1, 8, 8)


def sentences(samples: int) -> Tensor:
    return torch.randint(0, TOKENS, (samples, LENGTH))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], str]] = {
    "digits CNN, margin": (digits_cnn, images, "margin"),
    "digits CNN, 10 outputs": (digits_cnn, images, "outputs"),
    "transformer block of 64, margin": (lambda: Block(64), sentences, "margin"),
    "transformer block of 128, margin": (lambda: Block(128), sentences, "margin"),
}


def training(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def scoring(function: ModelFunction, engine: GradientEngine, theta: Tensor, x: Tensor, y: Tensor, chunk: int) -> Callable[[], object]:
    """One step of the path for all samples, as ``attribute`` takes it: chunk by chunk, each with its own totals."""
    targets = function(theta, x[:1], y[:1]).shape[1]
    scale = function.layout.views(1e-3 * torch.randn_like(theta))
    parts = []
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        parts.append((xs, ys, {e.name: theta.new_zeros(len(xs), targets, *e.shape) for e in function.layout.parameters}))

    def step() -> None:
        for xs, ys, total in parts:
            engine.accumulate(torch.lerp(theta, theta, 0.5), xs, ys, scale, total)

    return step


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="samples of a training step, and samples scored together")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--case", default="")
    parser.add_argument("--chunks", type=int, nargs="*", default=[16])
    parser.add_argument("--general", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(machine())
    for name, (build, data, target) in CASES.items():
        if options.case not in name:
            continue
        torch.manual_seed(0)
        model, x, y = build().to(device), data(options.batch).to(device), torch.randint(0, CLASSES, (options.batch,), device=device)
        layout = Layout.of(model)
        theta = layout.flatten(dict(model.named_parameters()))
        function = ModelFunction(model, layout, target=target, device=device)
        targets = function(theta, x[:1], y[:1]).shape[1]
        engine = choose_engine(function, theta, x, y)
        calls = {"train": training(model, x, y)}
        for chunk in options.chunks:
            calls[f"score{chunk}"] = scoring(function, engine, theta, x, y, chunk)
        if options.general:
            calls["vmap"] = scoring(function, VmapGradients(function), theta, x, y, 16)
        repeats = {k: max(1, int(0.03 / seconds(c, device, 3))) for k, c in calls.items()}
        times: dict[str, list[float]] = {k: [] for k in calls}
        for _ in range(options.rounds):
            for k, c in calls.items():
                times[k].append(seconds(c, device, repeats[k]))
        print(f"{name:34s} {type(engine).__name__} train {statistics.median(times['train'])/options.batch*1e6:.1f} us/sample  ", end="")
        for k in calls:
            if k != "train":
                r = statistics.median(targets * a / b for a, b in zip(times["train"], times[k]))
                print(f"{k} {r:.3f} ({1e6*statistics.median(times[k])/options.batch/targets:.1f} us)  ", end="")
        print()


if __name__ == "__main__":
    main()
