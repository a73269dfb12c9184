"""What every rank of ``tests/test_ranks.py`` runs: scores, figures and weights of tiny models, whose samples do not divide."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import Run, Trajectory, compare, compensate, durable, make_plan, masked, prune_layerwise, ranks, score
from prunekit.apply import layerwise
from prunekit.criteria import CriterionResult, Evidence
from prunekit.data import Samples
from prunekit.durable import locked, replacing
from prunekit.kernel import ModelFunction, masked_machine, reconstruct, shares_by_layer
from prunekit.measure import timed
from prunekit.recipe import prune_section
from prunekit.task import Task, get_task
from prunekit.task.evaluation import References, evaluate
from prunekit.training import recalibrate
from prunekit.verbs.comparing import compare_run
from prunekit.verbs.evaluating import evaluate as evaluate_run
from prunekit.verbs.pruning import prune_run
from prunekit.verbs.scoring import score_run
from tests.blocks.models import blocks
from tests.pictures import undrawn
from tests.structure_models import Mixture, Stack, random_scores
from tests.writer import Writer

SAMPLES = 7
ADDITIVE = ("influence", "influence(aggregation=l2)", "survival", "lca", "taylor", "fisher")
SUMMED = ("gradient", "snip", "grasp", "wanda", "obs", "kfac", "flap", "movement", "influence^0.25*magnitude^0.75")
PLAIN = ("synflow", "magnitude", "random", "lamp")
Found = dict[str, Any]


def drawn(evidence: Evidence) -> CriterionResult:
    """A criterion of the user's own that draws without a seed, and adds up losses of all batches."""
    _, batches = evidence.batch_losses()
    assert sum(share for _, share in batches) > 0.999
    return CriterionResult({name: torch.rand_like(weights) for name, weights in evidence.weights().items()})


def failing(evidence: Evidence) -> CriterionResult:
    """A criterion that one rank cannot compute."""
    if os.environ.get("RANK") == "1":
        raise ValueError("no such weight")
    return drawn(evidence)


def killed(evidence: Evidence) -> CriterionResult:
    """A criterion that takes too much memory on one rank."""
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return drawn(evidence)


def hanging(evidence: Evidence) -> CriterionResult:
    """A criterion that one rank does not come back from."""
    if os.environ.get("RANK") == "1":
        time.sleep(600)
    return drawn(evidence)


def filling(evidence: Evidence) -> CriterionResult:
    """A criterion after which the disk is full, which the rank that writes alone notices."""

    def full(what: str, path: Path) -> None:
        if what == "sync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ.get("RANK") == "0":
        durable.on_operation = full
    return drawn(evidence)


class Mixed(nn.Module):
    """What a sample gets depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.up(x)))
        return found


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def samples(count: int = SAMPLES, sizes: tuple[int, ...] = (4, 2, 1)) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(sizes), (torch.arange(count) % 3).split(sizes), strict=True))


def scored(trajectory: Trajectory) -> Iterator[tuple[str, Any]]:
    """Of every criterion, importances and axis sums."""
    model = small().double()
    for name in (*ADDITIVE, *SUMMED, *PLAIN):
        made = score(trajectory, model, samples(), criterion=name)
        yield name, {**made.importance, **made.axis_sums}
        yield f"{name}, cost", made.cost["gradient_evaluations"]
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 1, 4, 4, dtype=torch.float64)
    stack = Stack().double().eval()
    made = score(Trajectory.of(stack), stack, [(x, torch.arange(SAMPLES) % 3)], criterion="block_influence")
    yield "block_influence", dict(made.importance)
    mixture = Mixture().double().eval()
    made = score(Trajectory.of(mixture), mixture, [(x, torch.arange(SAMPLES) % 3)], criterion="reap")
    yield "reap", dict(made.importance)
    two = score(trajectory, model, samples()[1:2], criterion="influence")
    yield "fewer samples than ranks", dict(two.importance)
    mixed = Mixed().double()
    for name in ("gradient", "wanda"):
        yield (
            f"{name} of a model that mixes its batch",
            dict(score(Trajectory.of(mixed), mixed, samples(6, (6,)), criterion=name).importance),
        )


def own_criterion(trajectory: Trajectory) -> list[float]:
    torch.manual_seed(ranks.rank())
    return (
        score(trajectory, small().double(), samples(), criterion="tests.on_ranks:drawn").importance["0.weight"].flatten().tolist()
    )


def evaluated() -> Iterator[tuple[str, Any]]:
    """Figures of sums and of none, of tasks with and without labels, and of a model that mixes its batch."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    binary = [(x, (y > 0).double()) for x, y in samples()]
    tokens = torch.randint(50, (SAMPLES, 12), generator=torch.Generator().manual_seed(1))
    cases: dict[str, tuple[nn.Module, list[Any], Task]] = {
        "classes": (small().double(), samples(), get_task(None)),
        "binary": (logits, binary, get_task("binary")),
        "perplexity": (Writer(50, hidden=24).double(), [(tokens, tokens)], get_task("causal_lm")),
        "mixed": (Mixed().double(), samples(6, (6,)), get_task(None)),
    }
    for name, (model, batches, task) in cases.items():
        model.eval()
        plan = make_plan(random_scores(model), model, sparsity=0.5)
        given = Samples.of(batches, task.batch)
        dense = evaluate(model, given, task)
        pruned = evaluate(masked(model, plan), given, task, References(model, given, task))
        yield name, {**{f"dense {key}": rows for key, rows in dense.rows.items()}, **pruned.rows}
        yield f"{name}, figures", pruned.figures()
        yield f"{name}, lost", list(pruned.lost(dense))
    model = cases["classes"][0]
    found = compare(model, {"random": random_scores(model)}, samples(), sparsities=[0.3, 0.6])
    yield "compare", [{key: value for key, value in cell.items() if isinstance(value, float)} for cell in found.cells]


def compensated() -> Iterator[tuple[str, Any]]:
    torch.manual_seed(0)
    model, batches = small().double(), samples(30, (13, 17))
    masks = make_plan(random_scores(model), model, sparsity=0.5).masks()
    for inputs in ("dense", "pruned"):
        yield f"layerwise, {inputs}", dict(layerwise(model, masks, batches, inputs=inputs).state_dict())
    yield "compensate", dict(compensate(model, masks, batches, rounds=2, steps=3).state_dict())


class Centred(nn.Module):
    """What a sample gets depends on the others of its batch, and it may be alone there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        found: Tensor = self.head(torch.tanh(h - h.mean(0) / 2))
        return found


class Routed(nn.Module):
    """Each sample goes through one layer alone, so that some ranks' samples never reach the other."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = x.new_zeros(len(x), 5)
        for number, way in enumerate(self.ways):
            mine = (x[:, 0] > 0) == bool(number)
            if bool(mine.any()):
                found[mine] = way(x[mine])
        answer: Tensor = self.out(torch.relu(found))
        return answer


def by_layers() -> Iterator[tuple[str, Any]]:
    """Masks and weights found layer by layer, of blocks and without them, and statistics measured anew."""
    model, batches = blocks()
    x = torch.cat([x for x, _ in batches])
    some = [(x[:17], None), (x[17:23], None)]
    cases: dict[str, tuple[nn.Module, list[Any], Mapping[str, Any]]] = {
        "sparsegpt": (model, some, {}),
        "admm": (model, some, {"method": "admm"}),
        "wanda, 2:4": (model, some, {"method": "wanda", "structure": "2:4", "sparsity": None}),
        "magnitude": (model, some, {"method": "magnitude"}),
        "without blocks": (small().double(), samples(), {"damping": 0.1}),
        "two samples": (model, [(x[:2], None)], {"damping": 0.1}),
        "mixed": (Centred().double(), samples(6, (6,)), {"damping": 0.1}),
        "routed": (Routed().double(), [(torch.linspace(-1, 1, SAMPLES).double()[:, None].expand(-1, 4), None)], {"damping": 0.1}),
    }
    for name, (dense, given, options) in cases.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in dense.parameters():
                nn.init.normal_(parameter)
        plan, pruned = prune_layerwise(dense, given, task="unlabelled", **{"sparsity": 0.5, **options})
        yield f"layers by {name}", {**plan.keep, **{f"new {key}": tensor for key, tensor in pruned.state_dict().items()}}
        facts = plan.provenance["layerwise"]
        yield f"layers by {name}, facts", [facts["samples"], len(facts.get("by_magnitude", ())), len(plan.provenance["prunable"])]
    norms = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    for kind, batches in (("batches", samples()), ("samples", Samples.of(samples(5, (2, 3)), get_task(None).batch))):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in norms.parameters():
                nn.init.normal_(parameter)
        recalibrate(norms, [(x, y) for x, y in batches if len(x) > 1] if kind == "batches" else batches)
        yield f"recalibrated by {kind}", dict(norms.state_dict())


def rebuilt(trajectory: Trajectory) -> Iterator[tuple[str, Any]]:
    function = ModelFunction(small().double(), trajectory.layout)
    x, y = (torch.cat(parts) for parts in zip(*samples(), strict=True))
    for how in ({"tolerance": 1e-4}, {"tolerance": None, "nodes": 2}):
        made = reconstruct(function, trajectory.segments(), x, y, **how)
        yield f"rebuilt by {how}", {k: v for k, v in asdict(made).items() if isinstance(v, Tensor)}
        yield f"rebuilt by {how}, cost", made.evaluations
    mask = (torch.arange(trajectory.layout.total) % 3 > 0).double()
    yield "masked machine", {"": masked_machine(function, trajectory.segments(), mask, x, y)}
    yield "by layer", shares_by_layer(function, next(iter(trajectory.segments())), x, y)


def collectives(folder: Path) -> Iterator[tuple[str, Any]]:
    """What does not depend on how many ranks there are."""
    part = ranks.stretch(SAMPLES)
    yield "rows", {"": ranks.rows(torch.arange(SAMPLES)[part.start : part.stop, None] * torch.ones(2))}
    yield "first", ranks.from_first(lambda: [ranks.rank(), ranks.size(), sum(ranks.gathered(1))])
    yield "same", {"": ranks.same({"": torch.arange(3) + (0 if ranks.first() else 5)})[""]}
    with replacing(folder / "written") as temporary:
        temporary.write_text(f"{ranks.rank()}")
    yield "written", int((folder / "written").read_text())
    rounds = timed({"dense": small(), "pruned": small()}, torch.randn(2, 4), 0.01).rounds
    assert len(ranks.gathered(dict(rounds))) == ranks.size()
    assert all(other == ranks.gathered(dict(rounds))[0] for other in ranks.gathered(dict(rounds)))


def verbs(run: Path) -> None:
    """A whole run by the verbs that share."""
    opened = Run(run)
    with locked(run), undrawn():
        score_run(opened, ["influence", "gradient", "magnitude"])
        compare_run(opened)
        prune_run(opened, prune_section({"criterion": "auto", "sparsity": 0.5, "structure": "channels", "name": "auto"}))
        prune_run(opened, prune_section({"criterion": "influence", "max_drop": 20.0, "compensate": True, "name": "drop"}))
        prune_run(opened, prune_section({"layerwise": "wanda", "sparsity": 0.5, "name": "layers"}))
        evaluate_run(opened, run / "pruned" / "auto")


def everything(folder: Path, trajectory: Path) -> tuple[Found, dict[str, Tensor]]:
    """Values as JSON has them, and tensors, by what they are of."""
    path = Trajectory(trajectory)
    values: Found = {"own criterion": own_criterion(path)}
    tensors: dict[str, Tensor] = {}
    for parts in (scored(path), evaluated(), compensated(), by_layers(), rebuilt(path), collectives(folder)):
        for name, found in parts:
            if isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values()):
                tensors |= {f"{name}: {key}": value.detach().clone() for key, value in found.items()}
            else:
                values[name] = found
    return values, tensors


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, recorded, run = map(Path, sys.argv[1:])
    with ranks.joined():
        made = everything(place, recorded)
        with ranks.joined():  # inside it changes nothing
            verbs(run)
        me = f"{ranks.rank()}-of-{ranks.size()}"
        (place / f"{me}.json").write_text(json.dumps(made[0]))
        torch.save(made[1], place / f"{me}.pt")
    assert ranks.size() == 1
    with ranks.joined():  # and again
        assert ranks.gathered(ranks.rank()) == list(range(ranks.size()))
