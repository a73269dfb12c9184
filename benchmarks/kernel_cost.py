"""How far is scoring from the floor: one per-sample target gradient against one sample's share of a training step?

The floor of one gradient is what training pays for one: forward, backward, optimizer. Scoring cannot sum over the batch
and multiplies every sample's gradient with the step, weight by weight. Both take turns in rounds, so that a machine that
drifts drifts for both; a ratio is the median over rounds of (gradients a second) / (training samples a second).

    python benchmarks/kernel_cost.py [--device cuda] [--batch 64] [--rounds 30]

On a machine that others use too, OMP_NUM_THREADS=1 gives steadier figures than threads that wait for each other.
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
from prunekit.kernel.attribution import SAMPLES_AT_A_TIME
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


def scoring(function: ModelFunction, engine: GradientEngine, theta: Tensor, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One chunk of samples at one step of the path, as ``attribute`` takes it: the chunk's totals stay, the steps pass."""
    targets = function(theta, x[:1], y[:1]).shape[1]
    end = theta + 1e-3 * torch.randn_like(theta)
    scale = function.layout.views(end - theta)
    total = {e.name: theta.new_zeros(len(x), targets, *e.shape) for e in function.layout.parameters}
    return lambda: engine.accumulate(torch.lerp(theta, end, 0.5), x, y, scale, total)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def compare(build: Callable[[], nn.Module], x: Tensor, y: Tensor, target: str, rounds: int) -> tuple[float, list[float], str]:
    """Microseconds a training sample; ratio of the chosen and of the general engine; the chosen engine's name."""
    model = build().to(x.device)
    layout = Layout.of(model)
    theta = layout.flatten(dict(model.named_parameters()))
    function = ModelFunction(model, layout, target=target, device=x.device)
    targets = function(theta, x[:1], y[:1]).shape[1]
    chosen = choose_engine(function, theta, x, y)
    calls = [training(model, x, y), *(scoring(function, e, theta, x, y) for e in (chosen, VmapGradients(function)))]
    repeats = [max(1, round(0.03 / seconds(call, x.device, 3))) for call in calls]
    times = [[seconds(call, x.device, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(rounds)]
    ratios = [statistics.median(targets * row[0] / row[i] for row in times) for i in (1, 2)]
    return 1e6 * statistics.median(row[0] for row in times) / len(x), ratios, type(chosen).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=SAMPLES_AT_A_TIME, help="samples of a training step, and scored together")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(
        machine() if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}; {machine()}",
        f"batch {options.batch}",
        sep=", ",
    )
    print(f"{'model, target':34s} {'training':>15s} {'scoring':>8s} {'general':>8s}  engine")
    for name, (build, data, target) in CASES.items():
        torch.manual_seed(0)
        x, y = data(options.batch).to(device), torch.randint(0, CLASSES, (options.batch,), device=device)
        train, (ratio, general), engine = compare(build, x, y, target, options.rounds)
        print(f"{name:34s} {train:8.1f} us each {ratio:8.2f} {general:8.2f}  {engine}")


if __name__ == "__main__":
    main()
