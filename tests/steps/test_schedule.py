"""Schedules: how much goes when, masks inside masks, exact counts at the end, rewinding to recorded weights."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import Plan, Trajectory, UsageError
from prunekit.apply import apply_masks
from prunekit.criteria import Evidence, model_digest, score_evidence
from prunekit.data import Samples
from prunekit.errors import Note
from prunekit.kernel import ModelFunction, reconstruct
from prunekit.repair import refine
from prunekit.steps import Finetuning, Planner, Pruned, Schedule, cut, finetune, prune_by_schedule
from prunekit.steps.planner import _Shrinking
from prunekit.steps.schedule import cubic
from prunekit.training import TrainOptions, recalibrate, train
from prunekit.trajectory import Continued, Recorder
from tests.conftest import TinyNet, record, tiny_data
from tests.structure_models import HANDLED, IMAGES, Residual, random_scores

X, Y = tiny_data(24, torch.float64)
PRUNABLE = ("conv.weight", "head.weight")
CRITERIA = ("magnitude", "taylor", "influence", "random")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.01)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def how(**options: object) -> Finetuning:
    return Finetuning(
        lambda i: (X[i], Y[i]), len(X), optimizer_of, cosine, **{"epochs": 4, "batch_size": 8, "seed": 3, **options}
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Trajectory]:
    """A TinyNet trained as ``how`` says, so that rewinding can be compared with it: 12 steps."""
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = optimizer_of(model)
    with Recorder(tmp_path_factory.mktemp("dense") / "t", model, optimizer) as recorder:
        how = TrainOptions(lambda i: (X[i], Y[i]), 24, epochs=4, batch_size=8, seed=3)
        train(model, optimizer, cosine(optimizer, 12), how, recorder=recorder)
    return model, Trajectory(recorder.folder)


class Watching(Planner):
    """Keeps every plan with the model that it was made for."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.plans: list[Plan] = []
        self.states: list[Tensor] = []
        self.children: list[int] = []

    def plan(self, model: nn.Module, sparsity: float, before: Plan | None = None, child: Trajectory | None = None) -> Plan:
        self.plans.append(super().plan(model, sparsity, before, child))
        self.states.append(self.evidence.layout.flatten(dict(model.named_parameters())).clone())
        self.children.append(-1 if child is None else len(child))
        return self.plans[-1]


def planner(
    dense: tuple[nn.Module, Trajectory],
    criterion: str,
    structure: str = "unstructured",
    allocation: str = "global",
    **more: object,
) -> Watching:
    model, trajectory = dense
    evidence = Evidence(trajectory, model, PRUNABLE, Samples.held([(X[:6], Y[:6])]))
    return Watching(evidence, score_evidence(evidence, criterion), structure, allocation, X[:2], **more)


def nested(plans: list[Plan]) -> bool:
    return all(not (after.keep[n] & ~before.keep[n]).any() for before, after in itertools.pairwise(plans) for n in after.keep)


@given(sparsity=st.floats(0, 0.99), rounds=st.integers(1, 30))
def test_rounds_follow_their_formulas(sparsity: float, rounds: int) -> None:
    geometric = Schedule("iterative", rounds).sparsities(sparsity)
    linear = Schedule("iterative", rounds, "linear").sparsities(sparsity)
    assert len(geometric) == len(linear) == rounds
    assert geometric[-1] == linear[-1] == sparsity
    left = [1.0, *(1 - s for s in geometric)]
    for before, after in itertools.pairwise(left):
        assert after / before == pytest.approx((1 - sparsity) ** (1 / rounds))
    for before, after in itertools.pairwise([0.0, *linear]):
        assert after - before == pytest.approx(sparsity / rounds, abs=1e-12)


@given(sparsity=st.floats(0, 0.99), prunings=st.integers(1, 50))
def test_cubic_of_zhu_and_gupta(sparsity: float, prunings: int) -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³, s_i = 0."""
    every = 7
    for j in range(prunings + 1):
        t = j * every
        assert cubic(sparsity, j, prunings) == pytest.approx(sparsity + (0 - sparsity) * (1 - t / (prunings * every)) ** 3)
    found = Schedule("gradual", prunings).sparsities(sparsity)
    assert found[-1] == sparsity
    assert found == sorted(found)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 4), rounds=st.integers(2, 6), sparsity=st.floats(0, 0.98),
       structure=st.sampled_from(["unstructured", "channels"]), allocation=st.sampled_from(["global", "uniform"]))  # fmt: skip
def test_ties_and_zeros_never_bring_a_weight_back(
    seed: int, levels: int, rounds: int, sparsity: float, structure: str, allocation: str
) -> None:
    """Scores full of ties and zeros, drawn anew for every round: the hardest case for masks that only shrink."""
    from prunekit.plan import plan_from
    from prunekit.structure import channel_groups

    model = MODEL
    groups = channel_groups(model, IMAGES) if structure == "channels" else []
    plans: list[Plan] = []
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for number, target in enumerate(Schedule("iterative", rounds).sparsities(sparsity)):
        scores = random_scores(model, seed + number, levels)
        wanted = target
        if plans:
            scores = _Shrinking.of(scores, plans[-1].masks())
            wanted = max(target, plans[-1].sparsity()["prunable"]) if groups else target
        plans.append(plan_from(scores, model, groups, wanted, structure, allocation))
    assert nested(plans)
    if structure == "unstructured":
        assert sum(int((~k).sum()) for k in plans[-1].keep.values()) == round(sparsity * total)


MODEL = HANDLED["flattened"]()


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "channels"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("tuned", [False, True])
def test_iterative_masks_shrink_to_the_exact_count(dense, tmp_path: Path, criterion: str, structure: str, tuned: bool) -> None:
    found = planner(dense, criterion, structure)
    done = prune_by_schedule(dense[0], found, 0.7, Schedule("iterative", 3), how=how() if tuned else None, folder=tmp_path / "c")
    assert nested(found.plans)
    if structure == "unstructured":  # 39 prunable weights
        counts = [sum(int((~k).sum()) for k in p.keep.values()) for p in found.plans]
        assert counts == [round((1 - 0.3 ** (r / 3)) * 39) for r in (1, 2, 3)]
    named = dict(done.model.named_parameters())
    for name, mask in done.plan.masks().items():
        assert not named[name][~mask].any()
    assert done.plan.provenance["model"] == model_digest(dense[0])
    assert [r["steps"] for r in done.rounds] == [12 * tuned] * 3
    assert found.children == ([-1, 13 - 1, 25] if tuned and criterion == "influence" else [-1, -1, -1])
    if tuned:
        path = Continued(dense[1], Trajectory(tmp_path / "c"))
        assert torch.equal(path.state(-1), path.layout.flatten(named))
        rebuilt = reconstruct(ModelFunction(done.model, path.layout), path.segments(), X, Y, tolerance=1e-5)
        torch.testing.assert_close(rebuilt.rebuilt, done.model(X).detach(), atol=1e-3, rtol=0)


def test_rounds_score_the_model_as_it_is_by_then(dense) -> None:
    """Round 2 is what scoring the once pruned model says, cut down to what is left."""
    found = planner(dense, "taylor")
    prune_by_schedule(dense[0], found, 0.6, Schedule("iterative", 2))
    once = copy.deepcopy(dense[0])
    apply_masks(once, found.plans[0].masks())
    state = found.evidence.layout.flatten(dict(once.named_parameters()))
    assert torch.equal(found.states[1], state)
    anew = score_evidence(replace(found.evidence, at=state), "taylor")
    flat = torch.cat([torch.where(found.plans[0].keep[n], anew.importance[n], -1.0).flatten() for n in PRUNABLE])
    expected = torch.ones(39, dtype=torch.bool)
    expected[flat.sort(stable=True).indices[: round(0.6 * 39)]] = False
    assert torch.equal(torch.cat([found.plans[1].keep[n].flatten() for n in PRUNABLE]), expected)
    dense_scores = found.first.importance
    stale = torch.cat([torch.where(found.plans[0].keep[n], dense_scores[n], -1.0).flatten() for n in PRUNABLE])
    assert not torch.equal(stale.sort(stable=True).indices, flat.sort(stable=True).indices)


STEPPED = {
    "rounds": (Schedule("iterative", 3), {}),
    "tuned": (Schedule("iterative", 3), {"how": how()}),
    "gradual": (Schedule("gradual", 3), {"how": how()}),
    "rewound": (Schedule("iterative", 3), {"how": how(), "rewind": 5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "channels", "block:3x1"])
@pytest.mark.parametrize("steps", STEPPED)
def test_every_round_is_refined_inside_the_round_before(dense, steps: str, structure: str) -> None:
    """From the model as it is by then; what went earlier stays away; counts are those of unrefined rounds."""
    seen: list[tuple[Plan, nn.Module, Plan]] = []

    def repair(plan: Plan, model: nn.Module, swaps: object) -> Plan:
        found = refine(plan, model, [(X, Y)], swaps=swaps, rounds=4, steps=10)
        seen.append((plan, copy.deepcopy(model), found))
        return found

    schedule, options = STEPPED[steps]
    found = planner(dense, "random", structure, repair=repair)
    done = prune_by_schedule(dense[0], found, 0.7, schedule, **options)
    assert [after for _, _, after in seen] == found.plans
    assert nested(found.plans)
    changed = any(not torch.equal(after.keep[n], before.keep[n]) for before, _, after in seen for n in after.keep)
    assert changed == (structure != "channels")  # three channels leave little choice
    for number, (before, model, after) in enumerate(seen):
        count = [sum(int(k.sum()) for k in p.keep.values()) for p in (before, after)]
        assert count[0] == count[1]
        if structure == "unstructured":
            assert count[0] == 39 - round(schedule.sparsities(0.7)[number] * 39)
        facts = after.provenance["refine"]
        assert facts["after"]["accept"] <= facts["before"]["accept"]
        assert torch.equal(found.states[number], found.evidence.layout.flatten(dict(model.named_parameters())))
        assert done.rounds[number]["refined"] == {k: facts[k] for k in ("before", "after", "changed", "ended")}
    named = dict(done.model.named_parameters())
    assert all(not named[name][~mask].any() for name, mask in done.plan.masks().items())
    assert all(torch.equal(done.plan.keep[n], k) for n, k in seen[-1][2].keep.items())


def test_refined_rounds_hold_ratios_and_floor(dense) -> None:
    def repair(plan: Plan, model: nn.Module, swaps: object) -> Plan:
        return refine(plan, model, [(X, Y)], swaps=swaps, rounds=4, steps=10)

    found = planner(dense, "random", options={"ratios": {"conv.weight": 0.5}, "floor": 0.2}, repair=repair)
    done = prune_by_schedule(dense[0], found, 0.6, Schedule("iterative", 1))
    assert int(done.plan.keep["conv.weight"].sum()) == 27 - round(0.5 * 27)
    found = planner(dense, "random", options={"floor": 0.25}, repair=repair)
    prune_by_schedule(dense[0], found, 0.7, Schedule("iterative", 3))
    for plan in found.plans:
        assert all(int(keep.sum()) >= 0.25 * keep.numel() for keep in plan.keep.values())


@pytest.mark.parametrize("schedule", [Schedule("iterative", 2), Schedule("iterative", 1), Schedule("gradual", 2)])
def test_runs_cannot_be_pruned_in_steps(dense, schedule: Schedule) -> None:
    with pytest.raises(UsageError, match=r"2:4 removes 0\.5 of every run at once"):
        prune_by_schedule(dense[0], planner(dense, "magnitude", "2:4"), 0.5, schedule, how=how())


def test_a_path_criterion_without_fine_tuning_keeps_its_scores(dense) -> None:
    found = planner(dense, "influence")
    done = prune_by_schedule(dense[0], found, 0.6, Schedule("iterative", 4))
    at_once = prune_by_schedule(dense[0], planner(dense, "influence"), 0.6)
    assert found.rescored == 0
    assert all(torch.equal(done.plan.keep[n], at_once.plan.keep[n]) for n in PRUNABLE)


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("criterion", ["magnitude", "influence"])
def test_gradual_follows_the_cubic_at_every_event(dense, tmp_path: Path, criterion: str, every: int | None) -> None:
    found = planner(dense, criterion)
    schedule = Schedule("gradual", 3, every=every)
    done = prune_by_schedule(dense[0], found, 0.8, schedule, how=how(epochs=6), folder=tmp_path / "c")
    between = every or 3  # 18 steps: three prunings over the first nine
    child = Trajectory(tmp_path / "c")
    jumps = [s for s in range(len(child)) if not child.step(s).moved]
    assert jumps == [between * j + j - 1 for j in (1, 2, 3)]
    assert len(child) == 18 + 3
    for j, jump in enumerate(jumps, 1):
        for at in (jump + 1, [*jumps, len(child)][j]):  # right after it, and until the next
            zeros = sum(int((child.layout.views(child.state(at))[n] == 0).sum()) for n in PRUNABLE)
            assert zeros == round((0.8 - 0.8 * (1 - j / 3) ** 3) * 39)
    assert nested(found.plans)
    assert torch.equal(child.state(0), dense[1].state(-1))
    assert sum(r["steps"] for r in done.rounds) == 18
    rebuilt = reconstruct(ModelFunction(done.model, child.layout), Continued(dense[1], child).segments(), X, Y, tolerance=1e-5)
    torch.testing.assert_close(rebuilt.rebuilt, done.model(X).detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("iterative", 2)])
def test_rewinding_starts_at_the_recorded_weights(dense, tmp_path: Path, schedule: Schedule) -> None:
    done = prune_by_schedule(dense[0], planner(dense, "influence"), 0.5, schedule, how=how(), rewind=5, folder=tmp_path / "c")
    child, masks = Trajectory(tmp_path / "c"), done.plan.masks()
    views = child.layout.views(child.state(0))
    for name, early in child.layout.views(dense[1].state(5)).items():
        assert torch.equal(views[name], early * masks[name] if name in masks else early)
    assert len(child) == 12 - 5
    for s in range(7):  # the same samples and rates as in the dense training from step 5 on
        assert child.step(s).batches == dense[1].step(5 + s).batches
        assert child.step(s).groups[0]["lr"] == dense[1].step(5 + s).groups[0]["lr"]
    path = Continued(dense[1], child)
    assert len(path) == 5 + 1 + 7
    assert torch.equal(path.joint.start, dense[1].state(5))
    rebuilt = reconstruct(ModelFunction(done.model, child.layout), path.segments(), X, Y, tolerance=1e-5)
    torch.testing.assert_close(rebuilt.rebuilt, done.model(X).detach(), atol=1e-3, rtol=0)


def test_rewinding_with_nothing_pruned_is_the_dense_training(dense, tmp_path: Path) -> None:
    """SGD without momentum has no other state than its weights, so the same bits come out."""
    prune_by_schedule(dense[0], planner(dense, "magnitude"), 0.0, how=how(), rewind=5, folder=tmp_path / "c")
    child = Trajectory(tmp_path / "c")
    assert all(torch.equal(child.state(i), dense[1].state(5 + i)) for i in range(8))
    prune_by_schedule(dense[0], planner(dense, "magnitude"), 0.0, how=how(), rewind=5, end=9, folder=tmp_path / "d")
    assert torch.equal(Trajectory(tmp_path / "d").state(-1), dense[1].state(9))


def test_rewinding_says_where_training_ends_before_what_was_asked_for(dense, tmp_path: Path) -> None:
    with pytest.warns(Note, match="15 steps were asked for, 7 are left from step 5 to the dense training's end"):
        done = prune_by_schedule(dense[0], planner(dense, "magnitude"), 0.5, how=how(), rewind=5, end=20)
    assert [found["steps"] for found in done.rounds] == [7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_by_schedule(dense[0], planner(dense, "magnitude"), 0.5, how=how(), rewind=5, end=12)


def test_one_shot_is_plain_fine_tuning(dense, tmp_path: Path) -> None:
    found = planner(dense, "magnitude")
    done = prune_by_schedule(dense[0], found, 0.5, how=how(), folder=tmp_path / "c")
    by_hand = copy.deepcopy(dense[0])
    finetune(by_hand, found.plans[0], how())
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), by_hand.parameters(), strict=True))


def test_measures_before_and_after(dense) -> None:
    seen: list[float] = []

    def measure(model: nn.Module) -> float:
        seen.append(float(sum((p == 0).sum() for p in model.parameters())))
        return seen[-1]

    done: Pruned = prune_by_schedule(
        dense[0], planner(dense, "magnitude"), 0.5, Schedule("iterative", 2), how=how(), measure=measure
    )
    zeros = [round((1 - 0.5**0.5) * 39), round(0.5 * 39)]
    assert [(r["accuracy_pruned"], r["accuracy"]) for r in done.rounds] == [(z, z) for z in zeros]


@pytest.mark.parametrize("tuned", [False, True])
def test_recalibrated_statistics_are_those_of_the_pruned_model(tmp_path: Path, tuned: bool) -> None:
    """Measured by hand on the final weights; 0 where a channel is gone; one more piece of the path."""
    torch.manual_seed(0)
    model = Residual().double()
    trajectory = record(tmp_path / "t", model, torch.optim.AdamW(model.parameters(), lr=0.01), data=(X, Y))
    model.eval()
    names = tuple(n for n, p in model.named_parameters() if p.dim() > 1)
    evidence = Evidence(trajectory, model, names, Samples.held([(X[:6], Y[:6])]))
    batches = [(X[:12], Y[:12]), (X[12:], Y[12:])]
    found = Planner(evidence, score_evidence(evidence, "magnitude"), "channels", "uniform", X[:2])
    done = prune_by_schedule(
        model, found, 0.5, Schedule("iterative", 2), how=how() if tuned else None, folder=tmp_path / "c",
        recalibrate=lambda m: recalibrate(m, batches),
    )  # fmt: skip
    weights = dict(done.model.named_parameters())
    keep = done.plan.masks()["norm.weight"]
    assert 0 < int(keep.sum()) < 6
    with torch.no_grad():
        outputs = [nn.functional.conv2d(x, weights["stem.weight"], weights["stem.bias"], padding=1) for x, _ in batches]
    torch.testing.assert_close(done.model.norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    variance = torch.stack([o.transpose(0, 1).flatten(1).var(1) for o in outputs]).mean(0)
    torch.testing.assert_close(done.model.norm.running_var, variance)
    assert not done.model.norm.running_var[~keep].any()
    torch.testing.assert_close(cut(done.model, done.plan, X[:2])(X), done.model(X))
    if tuned:
        path = Continued(trajectory, Trajectory(tmp_path / "c"))
        named = {**dict(done.model.named_parameters()), **dict(done.model.named_buffers())}
        assert torch.equal(path.state(-1), path.layout.flatten(named))
        rebuilt = reconstruct(ModelFunction(done.model, path.layout, path.fixed), path.segments(), X, Y, tolerance=1e-3)
        torch.testing.assert_close(rebuilt.rebuilt, done.model(X).detach(), atol=2e-2, rtol=0)


def test_refusals(dense) -> None:
    model = dense[0]
    for schedule, options, said in (
        (Schedule("iterativ"), {}, "iterative"),
        (Schedule("iterative", 2, "lineer"), {}, "linear"),
        (Schedule("iterative", 0), {}, "1 or more"),
        (Schedule("gradual"), {}, "finetune"),
        (Schedule("gradual", 5, every=3), {"how": how()}, "step 15, fine-tuning after 12"),
        (Schedule("gradual", 2), {"how": how(), "rewind": 3}, "one-shot or iterative"),
        (Schedule(), {"rewind": 3}, "needs fine-tuning"),
        (Schedule(), {"how": how(), "rewind": 40}, "keeps no state 40; the nearest are 11 and 12"),
        (Schedule(), {"how": how(), "rewind": 12}, "steps 0 to 11"),
    ):
        with pytest.raises(UsageError, match=said):
            prune_by_schedule(model, planner(dense, "magnitude"), 0.5, schedule, **options)
    assert model_digest(model) == planner(dense, "magnitude").first.provenance["model"]
