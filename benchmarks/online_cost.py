"""What scoring influence online, while a language model trains, costs beside training alone: time a step, and memory.

    python benchmarks/online_cost.py [--sizes 2M 8M] [--windows 4 16 64] [--rounds 5]

Llamas of random weights are trained by AdamW in batches of 16 × 128 tokens, with nothing beside it and with ``OnlineInfluence``
of so many windows of 128 tokens, in turns: one target a window, its loss over all its tokens; midpoint rule, one node a step; the
linear layers of the blocks. Medians, ratios of one run. The scores keep ``windows × parameters`` numbers. Scoring a recorded path
costs the same passes, and no memory of that kind while training. Needs the extra ``hf``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from lm_growth import SIZES, TASK, made, timed

from prunekit.criteria import OnlineInfluence

BATCH, LENGTH, STEPS = 16, 128, 3
MEMORY = 2**34


def training(size: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A model, its optimizer, and some steps."""
    model = made(size, LENGTH, "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = TASK.batch(dict.fromkeys(("input_ids", "labels"), torch.randint(SIZES[size]["vocabulary"], (BATCH, LENGTH))))

    def steps() -> None:
        for _ in range(STEPS):
            TASK.loss.batch(TASK.outputs(model(**x) if isinstance(x, dict) else model(x)), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizer, steps


def measured(size: str, windows: list[int], rounds: int) -> None:
    model, optimizer, steps = training(size)
    times: dict[int, list[float]] = {number: [] for number in [0, *windows]}
    held: dict[int, float] = {}
    steps()
    for _ in range(rounds):
        for number in times:
            if not number:
                times[0].append(timed(steps, "cpu") / STEPS)
                continue
            tokens = torch.randint(SIZES[size]["vocabulary"], (number, LENGTH))
            x, y = TASK.batch({"input_ids": tokens, "labels": tokens})
            online = OnlineInfluence(model, optimizer, x, y, "loss", task=TASK, ignore=["*embed*"], memory=MEMORY)
            with online:
                times[number].append(timed(steps, "cpu") / STEPS)
            held[number] = sum(total.nbytes for total in online.total.values()) / 1e6
    plain = statistics.median(times[0])
    print(f"| {size} | {sum(p.numel() for p in model.parameters()):,} | none | {1000 * plain:.0f} | | |", flush=True)
    for number in windows:
        spent = statistics.median(times[number])
        ratio = statistics.median(b / a for a, b in zip(times[0], times[number], strict=True))
        print(f"| {size} | | {number} | {1000 * spent:.0f} | {ratio:.2f} | {held[number]:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["2M", "8M"], metavar="SIZE")
    parser.add_argument("--windows", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {BATCH} × {LENGTH} tokens a step")
    print("| size | parameters | windows scored | a step, ms | of training alone | scores hold, MB |\n|---|---|---|---|---|---|")
    for size in asked.sizes:
        measured(size, asked.windows, asked.rounds)


if __name__ == "__main__":
    main()
