"""How few steps of training make up the predictions: the steps that changed the loss most, alone."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.measure import accuracy, agreement, kl

from .common import function_of, note, table, trained

CASES = {"digits-cnn-sgd": "test", "modadd-transformer": "validation"}
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
ORDERS = ("by |change|", "by decrease", "last steps", "random")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=200, help="rebuilt samples of each model (the paper: 2000)")
    parser.add_argument("--draws", type=int, default=5, help="random orders, whose mean is shown")


def run(chosen: argparse.Namespace) -> str:
    text = (
        "Predictions rebuilt from the starting model and a share of the steps alone, `f(x; θ_0) + Σ_{s kept} (f(x; θ_{s+1}) - "
        "f(x; θ_s))`, log-probabilities, whole steps (kernel and decay). f at both ends of a step gives its exact term. Steps "
        "are ranked by how they changed the mean loss on the same samples: by the size of the change, by the decrease (steps "
        "that raised the loss go last); beside them the last steps of training, and random ones.\n"
    )
    for name, split in CASES.items():
        case = trained(name, chosen.out)
        function = function_of(case)
        x, y = case.splits[split].batch(range(min(chosen.samples, len(case.splits[split]))))
        with torch.no_grad():
            path = torch.stack([function(case.trajectory.state(0), x, y)] + [
                function(segment.end, x, y) for segment in case.trajectory.segments()
            ])  # fmt: skip
        note(f"{name}: {len(path)} states of {len(x)} samples")
        loss = torch.stack([F.nll_loss(values, y) for values in path])
        changes = (loss[1:] - loss[:-1]).double()
        rows = []
        for share in SHARES:
            count = max(1, round(share * len(changes)))
            cells = []
            for order in ORDERS:
                draws = range(chosen.draws if order == "random" else 1)
                found = [judged(path, ranked(changes, order, seed)[:count], y) for seed in draws]
                cells.append(" / ".join(f"{sum(v) / len(v):.3g}" for v in zip(*found, strict=True)))
            rows.append([f"{100 * share:g} % ({count})", *cells])
        up = float(changes.clamp_min(0).sum() / changes.abs().sum())
        half = int((changes.abs().sort(descending=True).values.cumsum(0) < 0.5 * changes.abs().sum()).sum()) + 1
        text += (
            f"\n{name}: {len(x)} {split} samples, {len(changes)} steps, accuracy of the model "
            f"{100 * accuracy(path[-1], y):.1f} %. {half} steps ({100 * half / len(changes):.1f} %) make half of all absolute "
            f"loss change; {100 * up:.0f} % of it raised the loss. Same answer as the model in % / KL in nats:\n\n"
            + table(("steps kept", *ORDERS), rows)
        )
    return text


def ranked(changes: Tensor, order: str, seed: int) -> Tensor:
    """Steps, first the ones to keep."""
    if order == "random":
        return torch.randperm(len(changes), generator=torch.Generator().manual_seed(seed))
    keys = {"by |change|": changes.abs(), "by decrease": -changes, "last steps": torch.arange(len(changes))}
    return keys[order].argsort(descending=True)


def judged(path: Tensor, kept: Tensor, y: Tensor) -> tuple[float, float]:
    """Agreement in % with, and KL to, the last state of ``path`` ``(states, samples, classes)``."""
    rebuilt = path[0].double() + (path[kept + 1].double() - path[kept].double()).sum(0)
    return 100 * agreement(rebuilt, path[-1]), kl(rebuilt, path[-1])
