"""What does recording cost, and what do scores lose when less is kept?

Trains the digits CNN with and without a recorder in turn (ratios of medians), then scores the same run from every state,
every k-th state and half-precision differences. Prints a table for benchmarks/README.md.

    python benchmarks/recording.py
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from prunekit import Recorder, Scores, Trajectory, score
from prunekit.data import Split, digits
from prunekit.measure import machine
from prunekit.models import digits_cnn

EPOCHS, BATCH = 10, 64
WAYS: dict[str, dict[str, Any]] = {
    "every state": {},
    "every 2nd": {"every": 2},
    "every 4th": {"every": 4},
    "every 10th": {"every": 10},
    "half-precision differences": {"states": "half"},
    "with second moments": {"second_moments": True},
}


def train(
    split: Split, folder: Path | None, optimizer_name: str, options: dict[str, Any]
) -> tuple[torch.nn.Module, float, float]:
    """One training run from the same seed; seconds of the loop, and of the recorder's closing after it."""
    torch.manual_seed(0)
    model = digits_cnn()
    if optimizer_name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    generator = torch.Generator().manual_seed(0)
    recorder = Recorder(folder, model, optimizer, **options) if folder is not None else None
    with recorder or contextlib.nullcontext():
        started = time.perf_counter()
        for _ in range(EPOCHS):
            for indices in torch.randperm(len(split), generator=generator).split(BATCH):
                x, y = split.batch(indices)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if recorder is not None:
                    recorder.batch(indices)
                optimizer.step()
        looped = time.perf_counter()
    return model, looped - started, time.perf_counter() - looped


def flat(scores: Scores) -> torch.Tensor:
    return torch.cat([scores.importance[name].flatten() for name in sorted(scores.importance)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved training runs of each kind")
    parser.add_argument("--samples", type=int, default=32, help="scoring samples")
    options = parser.parse_args()
    splits = {name: Split(pair) for name, pair in digits().items()}
    print(f"machine: {machine()}")
    with tempfile.TemporaryDirectory() as scratch:
        times: dict[str, list[float]] = {"plain": [], "recorded": []}
        closing = []
        for number in range(options.rounds):
            for name in times:
                folder = Path(scratch) / f"time-{number}" if name == "recorded" else None
                _, loop, close = train(splits["train"], folder, "adamw", {})
                times[name].append(loop)
                closing.append(close)
            print(f"timing round {number + 1} of {options.rounds}", file=sys.stderr)
        share = statistics.median(closing[1::2]) / statistics.median(times["plain"])
        ratios = [r / p for r, p in zip(times["recorded"], times["plain"], strict=True)]
        print(
            f"recording every state of the digits CNN: {statistics.median(ratios):.3f} of the time without "
            f"(median of {options.rounds} interleaved ratios, {min(ratios):.3f} to {max(ratios):.3f}; goal: at most 1.10); "
            f"closing the recording (hashing it) takes another {share:.3f}"
        )
        for optimizer in ("adamw", "sgd"):
            reference: torch.Tensor | None = None
            for way, how in WAYS.items():
                folder = Path(scratch) / f"{optimizer}-{way}"
                model, _, _ = train(splits["train"], folder, optimizer, how)
                trajectory = Trajectory(folder)
                size = sum(p.stat().st_size for p in folder.iterdir() if p.name != "snapshot.safetensors")
                found = flat(score(trajectory, model, [splits["scoring"].batch(range(options.samples))], nodes=4))
                reference = found if reference is None else reference
                print(
                    f"{optimizer}, {way}: {size / len(trajectory) / trajectory.layout.total:.2f} bytes a coordinate and step, "
                    f"influence against every state: Spearman {spearmanr(found, reference).statistic:.4f}, relative difference "
                    f"{float((found - reference).norm() / reference.norm()):.2e}"
                )


if __name__ == "__main__":
    main()
