"""Refined again after fine-tuning: what the model between is, counts, zeros, momenta, and a path that stays complete."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Finetuning, Plan, Planner, RefineAgain, Schedule, Trajectory, UsageError, prune_by_schedule, refine
from prunekit.criteria import Evidence, score_evidence
from prunekit.data import Samples
from prunekit.explain import account
from prunekit.explain.removal import flat_mask
from prunekit.kernel import ModelFunction, blame, reconstruct
from prunekit.steps import Tuner
from prunekit.steps.again import returning
from prunekit.trajectory import Continued, Layout, Segment
from tests.conftest import TinyNet, record, tiny_data
from tests.reference import kl_target

X, Y = tiny_data(24, torch.float64)
PRUNABLE = ("conv.weight", "head.weight")
STRUCTURES = ["unstructured", "channels", "block:3x1", "1:4"]
KEPT = 0.6


def how(**options: Any) -> Finetuning:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.02)

    return Finetuning(lambda i: (X[i], Y[i]), len(X), adam, **{"epochs": 4, "batch_size": 8, "seed": 3, **options})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Trajectory]:
    torch.manual_seed(0)
    model = TinyNet().double()
    return model, record(tmp_path_factory.mktemp("again") / "t", model, torch.optim.SGD(model.parameters(), lr=0.2))


def planner(dense: tuple[nn.Module, Trajectory], structure: str, repair: Any = None) -> Planner:
    model, trajectory = dense
    evidence = Evidence(trajectory, model, PRUNABLE, Samples.held([(X[:6], Y[:6])]))
    scores = score_evidence(evidence, "random")  # the worst of masks: there is something to repair
    return Planner(evidence, scores, structure, "global", X[:2], repair=repair)


def flat(model: nn.Module) -> Tensor:
    layout = Layout.of(model)
    return layout.flatten({**dict(model.named_parameters()), **dict(model.named_buffers())}).detach()


def kl(reference: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Mean KL, written out."""
    with torch.no_grad():
        p, q = (torch.softmax(m(x), -1) for m in (reference, model))
    return float((p * (p.log() - q.log())).sum(-1).mean())


class Refined:
    """Refines again, and keeps what it saw."""

    def __init__(self, **options: Any) -> None:
        self.options = {"rounds": 6, "steps": 20, **options}
        self.seen: list[tuple[Plan, nn.Module, Plan]] = []

    def __call__(self, plan: Plan, base: nn.Module, reference: nn.Module) -> Plan:
        found = refine(plan, base, [(X[:16], Y[:16])], accept=[(X[16:], Y[16:])], reference=reference, **self.options)
        self.seen.append((plan, copy.deepcopy(base), found))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_round_keeps_the_size_and_is_never_worse(dense, structure: str) -> None:
    refined, model = Refined(), dense[0]
    sparsity = 0.75 if structure == "1:4" else KEPT
    made = planner(dense, structure)
    first = made.plan(model, sparsity)
    done = prune_by_schedule(model, planner(dense, structure), sparsity, how=how(), again=RefineAgain(3, refined))
    assert [r.get("again") for r in done.rounds] == [None, 1, 2, 3]
    assert [r["seed"] for r in done.rounds] == [3, 4, 5, 6]
    before, moved = first, 0
    for number, (given, base, after) in enumerate(refined.seen):
        assert all(torch.equal(given.keep[n], before.keep[n]) for n in given.keep)
        sizes = [{n: int(k.sum()) for n, k in p.keep.items()} for p in (given, after)]
        assert sum(sizes[0].values()) == sum(sizes[1].values())
        assert structure != "channels" or sizes[0] == sizes[1]
        facts = after.provenance["refine"]
        for side, plan in (("before", given), ("after", after)):
            masked = copy.deepcopy(base)
            masks = plan.masks()
            with torch.no_grad():
                for name, tensor in masked.named_parameters():
                    tensor.mul_(masks.get(name, torch.ones_like(tensor)))
            assert facts[side]["accept"] == pytest.approx(kl(model, masked, X[16:]), rel=1e-9)
        assert facts["after"]["accept"] <= facts["before"]["accept"]
        assert done.rounds[number + 1]["refined"] == {k: facts[k] for k in ("before", "after", "changed", "ended")}
        moved, before = moved + facts["changed"], after
    assert (moved > 0) == (structure != "channels")  # three channels leave little choice
    assert all(torch.equal(done.plan.keep[n], before.keep[n]) for n in before.keep)
    assert [f["moved"] for f in done.plan.provenance["refine_again"]] == [
        p.provenance["refine"]["moved"] for *_, p in refined.seen
    ]
    named = dict(done.model.named_parameters())
    assert all(not named[name][~mask].any() for name, mask in done.plan.masks().items())


def test_between_rounds_the_removed_weights_are_dense_and_blame_is_complete(dense) -> None:
    refined, model = Refined(), dense[0]
    prune_by_schedule(model, planner(dense, "unstructured"), KEPT, how=how(), again=RefineAgain(1, refined))
    given, base, _ = refined.seen[0]
    gone = ~flat_mask(given, Layout.of(model))
    start, dense_theta = flat(base), flat(model)
    assert torch.equal(start[gone], dense_theta[gone])
    assert not torch.equal(start[~gone], dense_theta[~gone])
    function = ModelFunction(model, Layout.of(model), {}, kl_target)
    reference = F.log_softmax(model(X), -1).detach()
    step = Segment(0, start, start * ~gone, torch.zeros_like(start))
    found = blame(function, step, [(X, reference)], nodes=64)
    assert kl(model, base, X) > 0
    assert found.change == pytest.approx(_masked_kl(model, base, ~gone) - kl(model, base, X), rel=1e-9)
    assert float(found.values.sum()) == pytest.approx(found.change, abs=1e-4 * abs(found.change))
    assert not found.values[~gone].any()


def _masked_kl(model: nn.Module, base: nn.Module, keep: Tensor) -> float:
    other = copy.deepcopy(base)
    views = Layout.of(model).views(flat(base) * keep)
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            tensor.copy_(views[name])
    return kl(model, other, X)


def test_the_base_of_a_model_that_was_not_trained_is_the_dense_one(dense) -> None:
    """Then refining again is refining: the same plan."""
    model = dense[0]
    plan = planner(dense, "unstructured").plan(model, KEPT)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in plan.masks().items():
            dict(masked.named_parameters())[name].mul_(mask)
    base = returning(masked, model, plan)
    assert torch.equal(flat(base), flat(model))
    options: dict[str, Any] = {"rounds": 6, "steps": 20}
    one, other = (refine(plan, m, [(X, Y)], reference=r, **options) for m, r in ((model, None), (base, model)))
    assert one.digest == other.digest


@pytest.mark.slow
@pytest.mark.parametrize("structure", [pytest.param("unstructured", marks=pytest.mark.exhaustive), "channels"])
def test_the_path_is_complete_where_weights_come_back(dense, tmp_path: Path, structure: str) -> None:
    model, trajectory = dense
    layout = trajectory.layout

    def swapped(plan: Plan, base: nn.Module, reference: nn.Module) -> Plan:
        """Every removed unit comes back as far as the count allows: channels by turns, weights from the other end."""
        keep = {n: k.flatten().roll(1).view(k.shape) if structure == "channels" else k.flatten().flip(0).view(k.shape)
                for n, k in plan.keep.items()}  # fmt: skip
        facts = {"before": {}, "after": {}, "changed": 1, "ended": "done", "history": [], "moved": {}}
        return replace(plan, keep=keep, provenance={**plan.provenance, "refine": facts})

    folder = tmp_path / "child"
    first = planner(dense, structure).plan(model, KEPT)
    done = prune_by_schedule(
        model, planner(dense, structure), KEPT, how=how(epochs=2), folder=folder, again=RefineAgain(2, swapped)
    )
    child = Trajectory(folder)
    path = Continued(trajectory, child)
    jumps = [s for s in child.segments() if s.jump]
    assert len(jumps) == 2
    masks = [flat_mask(first, layout)]
    back = ~masks[0] & jumps[0].end.bool()
    assert bool(back.any())
    assert torch.equal(jumps[0].end[back], trajectory.state(-1)[back])
    assert torch.equal(path.state(-1), flat(done.model))
    function = ModelFunction(model, layout, {}, "outputs")
    found = reconstruct(function, path.segments(), X, Y, nodes=12, rule="gauss-legendre", tolerance=None, jumps=1e-9)
    assert torch.allclose(found.rebuilt, done.model(X).detach(), atol=1e-6)
    # what eval tells: layers sum up to the change, and the kept weights' machine goes along where they come back
    mask = flat_mask(done.plan, layout)
    whole = reconstruct(function, trajectory.segments(), X, Y, nodes=12, rule="gauss-legendre", tolerance=None)
    told = account(function, trajectory, whole, path.state(-1), mask, X, Y, tolerance=1e-6, stride=1, child=child, nodes=12)
    assert told["pruned"]["mean_error"] < 1e-5
    assert told["pruned"]["by_layer_residual"] < 1e-3 * told["pruned"]["mean_change"]
    assert "new_values" not in told["pruned"]  # what came back had gone first, and has its dense value
    machine = model(X).detach() * 0
    begin = trajectory.state(0)
    machine += function(begin, X, Y)
    for piece in path.segments():
        machine += function.directional((piece.start + piece.end) / 2, (piece.end - piece.start) * mask, X, Y)[1]
    expected = float((machine - done.model(X).detach()).abs().mean())
    assert told["masked_machine"]["mean_error"] == pytest.approx(expected, rel=0.05)


def test_what_changes_places_loses_its_momenta(dense) -> None:
    model = copy.deepcopy(dense[0])
    plan = planner(dense, "unstructured").plan(model, KEPT)
    old = plan.masks()
    new = {n: m.flatten().flip(0).view(m.shape) for n, m in old.items()}
    with Tuner(model, old, how(), None, {}) as tuner:
        tuner.run()
        named = dict(model.named_parameters())
        before = {n: {k: v.clone() for k, v in tuner.optimizer.state[p].items()} for n, p in named.items()}
        trained = {n: p.detach().clone() for n, p in named.items()}
        tuner.swap(new, {n: p.detach() for n, p in dense[0].named_parameters()})
        for name, mask in new.items():
            stays, back = mask & old[name], mask & ~old[name]
            assert bool(back.any())
            assert torch.equal(named[name][stays], trained[name][stays])
            assert torch.equal(named[name][back], dict(dense[0].named_parameters())[name][back])
            assert not named[name][~mask].any()
            for key in ("exp_avg", "exp_avg_sq"):
                state = tuner.optimizer.state[named[name]][key]
                assert torch.equal(state, before[name][key] * stays)
        tuner.run()
        assert all(not named[name][~mask].any() for name, mask in new.items())


def test_it_follows_the_last_round_of_a_schedule(dense) -> None:
    """Masks shrink round by round; then what went in the first may come back as well."""
    refined = Refined()

    def repair(plan: Plan, model: nn.Module, swaps: object) -> Plan:
        return refine(plan, model, [(X, Y)], swaps=swaps, rounds=2, learn=False)

    found = planner(dense, "unstructured", repair)
    done = prune_by_schedule(dense[0], found, KEPT, Schedule("iterative", 2), how=how(epochs=1), again=RefineAgain(1, refined))
    assert [r.get("again") for r in done.rounds] == [None, None, 1]
    assert sum(int(k.sum()) for k in done.plan.keep.values()) == 39 - round(KEPT * 39)
    assert done.plan.provenance["refine"]["before"] == done.rounds[1]["refined"]["before"]


@pytest.mark.parametrize(
    ("schedule", "options", "line"),
    [
        (Schedule(), {}, "give finetune"),
        (Schedule("gradual", 2), {"how": how()}, "not gradual"),
        (Schedule(), {"how": how(), "rewind": 2}, "rewinding from early ones"),
    ],
)
def test_refusals(dense, schedule: Schedule, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        prune_by_schedule(dense[0], planner(dense, "unstructured"), KEPT, schedule, again=RefineAgain(1, Refined()), **options)


def test_a_reference_of_other_tensors_is_refused(dense) -> None:
    plan = planner(dense, "unstructured").plan(dense[0], KEPT)
    with pytest.raises(UsageError, match="reference's tensors"):
        refine(plan, dense[0], [(X, Y)], reference=nn.Linear(2, 2).double())
