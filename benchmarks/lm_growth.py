"""What a step of learning a mask costs beside a step of training, as a language model grows: time, and memory beside the model.

    python benchmarks/lm_growth.py                      # 2, 8 and 30 million parameters, on the CPU
    python benchmarks/lm_growth.py --autocast reference # the dense model alone in bfloat16
    python benchmarks/lm_growth.py --device cuda --sizes 2M 30M 1B --autocast

A training step is a forward and a backward pass of the next token's loss and AdamW's update of every parameter; a learning step
is the dense model's forward pass, the pruned one's with the KL between them, its backward pass, the scores' update and the new
mask. Both take the same batch, turn by turn; figures are medians, ratios are of one run. Models are Llamas with random weights,
which neither step's cost depends on. Needs the extra ``hf``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import nn

from prunekit import Trajectory, make_plan, score
from prunekit.data import Samples
from prunekit.repair.streamed import Streaming, StreamLearning
from prunekit.repair.swaps import get_swaps
from prunekit.task import get_task
from prunekit.trajectory import Layout

SIZES: dict[str, dict[str, int]] = {
    "2M": {"vocabulary": 2048, "width": 192, "layers": 4, "heads": 6, "kv_heads": 2, "hidden": 512},
    "8M": {"vocabulary": 4096, "width": 320, "layers": 6, "heads": 10, "kv_heads": 2, "hidden": 896},
    "30M": {"vocabulary": 8192, "width": 512, "layers": 10, "heads": 8, "kv_heads": 4, "hidden": 1376},
    "1B": {"vocabulary": 32000, "width": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "hidden": 5632},
}
TASK = get_task("causal_lm")
Autocast = bool | Literal["reference"]


def made(size: str, length: int, device: str) -> nn.Module:
    from prunekit.models import llama

    torch.manual_seed(0)
    with torch.device(device):  # a billion random weights are soon drawn where they are needed
        return llama(**SIZES[size], length=length, tied=size != "1B").eval()


def synchronised(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> float:
    synchronised(device)
    begun = time.perf_counter()
    run()
    synchronised(device)
    return time.perf_counter() - begun


def trainer(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], autocast: bool) -> Callable[[], None]:
    """A step of training a model, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    kind = batch[0].device.type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=autocast):
            loss = TASK.loss.batch(TASK.outputs(model(batch[0])), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def learning_of(model: nn.Module, samples: Samples, batch: int, autocast: Autocast) -> StreamLearning:
    """Learning at sparsity 0.5, the linear layers of the blocks."""
    left = [pattern for pattern in ("*embed*", "*head*") if any(fnmatch(name, pattern) for name, _ in model.named_parameters())]
    plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude", ignore=left), model, sparsity=0.5)
    swaps = get_swaps(plan, Layout.of(model), next(model.parameters()).device)
    how = Streaming(tokens=samples_tokens(samples) * 4, batch=batch, autocast=autocast)
    return StreamLearning(swaps, model, samples, samples, how, task=TASK)


def samples_tokens(samples: Samples) -> int:
    return sum(y.numel() for _, y in samples)


def measured(size: str, device: str, batch: int, length: int, rounds: int, autocast: Autocast) -> dict[str, Any]:
    model = made(size, length, device)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = torch.randint(SIZES[size]["vocabulary"], (batch, length))
    samples = Samples.of([(tokens, tokens)], TASK.batch)
    x, y = (part.to(device) for part in samples.batch(0))
    learning = learning_of(model, samples, batch, autocast)
    learner = learning.begin(iter([[(x, y)]] * 4))
    peaks = {}
    train = trainer(made(size, length, device).train(), (x, y), autocast is True)

    def learn() -> None:
        learning.step([(x, y)], 0.5)

    times: dict[str, list[float]] = {"train": [], "learn": []}
    for number in range(rounds + 2):
        for name, step in (("train", train), ("learn", learn)):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            spent = timed(step, device)
            if device != "cpu":
                peaks[name] = torch.cuda.max_memory_allocated() - before
            if number >= 2:
                times[name].append(spent)
    return {
        "parameters": parameters,
        "train_ms": 1000 * statistics.median(times["train"]),
        "learn_ms": 1000 * statistics.median(times["learn"]),
        "ratio": statistics.median(b / a for a, b in zip(times["train"], times["learn"], strict=True)),
        "tokens_per_second": batch * length / statistics.median(times["learn"]),
        "bytes_a_weight": 4 + learner.bytes() / len(learner.scores),
        "peaks": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["2M", "8M", "30M"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--autocast",
        nargs="?",
        choices=["both", "reference"],
        const="both",
        help="compute in bfloat16: both steps, or the dense model",
    )
    asked = parser.parse_args()
    autocast: Autocast = "reference" if asked.autocast == "reference" else asked.autocast == "both"
    where = torch.cuda.get_device_name() if asked.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    precision = f", bfloat16: {asked.autocast}" if autocast else ""
    print(f"{where}, torch {torch.__version__}, {asked.batch} × {asked.length} tokens{precision}")
    print(
        "| size | parameters | training step, ms | learning step, ms | ratio | tokens/s | bytes a weight | peak of a step, GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in asked.sizes:
        row = measured(size, asked.device, asked.batch, asked.length, asked.rounds, autocast)
        gc.collect()
        if asked.device != "cpu":
            torch.cuda.empty_cache()
        peaks = " / ".join(f"{row['peaks'][name] / 1e9:.2f}" for name in ("train", "learn") if name in row["peaks"])
        print(
            f"| {size} | {row['parameters']:,} | {row['train_ms']:.1f} | {row['learn_ms']:.1f} | {row['ratio']:.2f} | "
            f"{row['tokens_per_second']:,.0f} | {row['bytes_a_weight']:.2f} | {peaks or '-'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
