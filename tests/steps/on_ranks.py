"""What every rank of ``tests/steps/test_ranks.py`` runs: fine-tunings of tiny models, in double precision, as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import (
    Finetuning,
    Plan,
    Planner,
    Schedule,
    Trajectory,
    finetune,
    hold_masks,
    make_plan,
    prune_by_schedule,
    ranks,
    score,
)
from prunekit.data import Samples
from prunekit.steps import ByDivergence
from prunekit.task import Classification
from prunekit.training import AUGMENTATIONS, Distillation, augmented
from prunekit.trajectory import replay

SAMPLES = 25  # the last batch of an epoch has one, so that other ranks have none
X = torch.randn(SAMPLES, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.where(torch.arange(SAMPLES) < 6, -1, torch.arange(SAMPLES) % 3)  # -1 is not counted
FLIP = AUGMENTATIONS["horizontal_flip"]
LOSS = partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), ignore_index=-1)


class Net(nn.Module):
    """One layer is never called, so that no gradient comes to it."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.conv, self.out, self.never = nn.Conv2d(1, 4, 3), nn.Linear(64, 3), nn.Linear(2, 2)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.norm(self.conv(x)).relu().flatten(1)))


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**options).double().eval()


def how(**options: Any) -> Finetuning:
    given = {"epochs": 2, "batch_size": 8, "seed": 1, "task": Classification(LOSS), **options}
    return Finetuning(lambda at: (X[at], Y[at]), SAMPLES, lambda m: torch.optim.AdamW(m.parameters(), lr=0.02), **given)


def plan_of(model: nn.Module) -> Plan:
    return make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)


def tuned(model: nn.Module, options: Finetuning, folder: Path | None = None) -> list[float]:
    return finetune(model, plan_of(model), options, folder, Trajectory.of(model))


def told(model: nn.Module, losses: list[float] | None = None) -> dict[str, Any]:
    return {"losses": losses, "state": {name: value.flatten().tolist() for name, value in model.state_dict().items()}}


def recorded(folder: Path) -> bool:
    """Whether the recorded steps, taken again by one process, are those that were taken, noise and all."""
    model, options = net(dropout=0.3), how(augment=FLIP)
    tuned(model, options, folder / "child")
    if ranks.first():
        with ranks.apart():
            child, again = Trajectory(folder / "child"), net(dropout=0.3)
            batch = augmented(options.batch, FLIP)
            optimizer = options.optimizer(again)
            with hold_masks(again, plan_of(again), optimizer):
                found = replay(child, again, optimizer, batch, LOSS, folder / "again", tolerance=1e-12)
            return bool(torch.allclose(found.state(-1), child.state(-1), rtol=0, atol=1e-12)) and len(child) == 8
    return True


def by_rounds(folder: Path) -> dict[str, Any]:
    """The second round's plan is made from the first one's recorded steps."""
    model = net()
    later = net()
    with torch.no_grad():
        for parameter in later.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=parameter.dtype)
    data = [(X, Y.clamp_min(0))]
    planner = Planner.of(Trajectory.of(model, later), later, data, criterion="influence")
    done = prune_by_schedule(later, planner, 0.6, Schedule("iterative", rounds=2), how=how(), folder=folder)
    return {**told(done.model), "keep": {name: keep.flatten().int().tolist() for name, keep in done.plan.keep.items()}}


def results(folder: Path) -> dict[str, Any]:
    plain, distilled, searched, normed = net(), net(), net(), net(norm=True)
    teacher = Distillation(net(), temperature=2.0, weight=0.4)
    far = ByDivergence(net(), Samples.held([(X, Y.clamp_min(0))]), Classification())
    return {
        "same": {
            "plain": told(plain, tuned(plain, how())),
            "distilled": told(distilled, tuned(distilled, how(distill=teacher))),
            "at a searched rate": told(searched, tuned(searched, how(distill=teacher, rate=far))),
            "by rounds": by_rounds(folder / "rounds"),
        },
        "own": told(normed, tuned(normed, how())),
        "random": torch.rand(1).item(),
        "recorded": recorded(folder),  # taken again by the first rank alone
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.joined():
        folder = Path(sys.argv[1])
        (folder / f"{ranks.rank()}.json").write_text(json.dumps(results(folder)))
