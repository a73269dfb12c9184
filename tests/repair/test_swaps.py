"""Which units there are and which sets of them are allowed: counts exact, nothing lost between units and coordinates."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import Plan, UsageError, make_plan
from prunekit.kernel import ModelFunction, blame
from prunekit.kernel.gradients import choose_engine
from prunekit.repair.limits import Limits
from prunekit.repair.swaps import Runs, Swaps, get_swaps, swaps_inside
from prunekit.structure import GROUPED
from prunekit.trajectory import Layout, Segment
from tests.conftest import tiny_data
from tests.plan.test_uniform import Stacked
from tests.reference import kl_target
from tests.structure_models import ATTENTIVE, HANDLED, IMAGES, STACKED, random_scores

CPU = torch.device("cpu")
HEADED = ["separate", "grouped queries", "packed"]
KINDS = ["weights", "floor", "ratios", "2:4", "block:2x3", "block:2x3 floor", "channels", "channels floor", "channels ratios",
         "channels within", "heads", "heads within", "layers", "heads+neurons", "neurons+layers",
         "neurons+layers within"]  # fmt: skip
MODELS = {"heads": HEADED, "heads within": HEADED, "channels ratios": ["flattened", "joined"], "layers": ["pre-norm", "blocks"],
          "heads+neurons": ["stacked"], "neurons+layers": ["stacked"], "neurons+layers within": ["stacked"]}  # fmt: skip
BUILD = {**HANDLED, **ATTENTIVE, **STACKED, "stacked": partial(Stacked, 4)}
FLOOR = 0.2
CASES = [(kind, name) for kind in KINDS for name in MODELS.get(kind, ["flattened", "residual", "joined"])]


def pattern_of(kind: str, name: str, sparsity: float, seed: int = 0) -> tuple[nn.Module, Plan, Swaps]:
    torch.manual_seed(seed)
    model = BUILD[name]().double()
    model(torch.randn(50, 1, 4, 4, dtype=torch.float64))
    model.eval()
    structure = {"weights": "unstructured", "floor": "unstructured", "ratios": "unstructured"}.get(kind, kind.split()[0])
    scores = random_scores(model, seed)
    options: dict[str, Any] = {}
    if "floor" in kind:
        options["floor"] = FLOOR
    if kind == "ratios":
        options["ratios"] = {"out.weight": 0.5}
    if kind == "channels ratios":
        options["ratios"], sparsity = {fixed_group(name): 0.25}, max(sparsity, 0.4)
    share = None if ":" in structure and "block" not in structure else min(sparsity, 0.7) if options else sparsity
    plan = make_plan(scores, model, IMAGES.double(), sparsity=share, structure=structure, **options)
    layout = Layout.of(model)
    return model, plan, get_swaps(plan, layout, CPU, across="within" not in kind)


def fixed_group(name: str) -> str:
    """A group of channels that a ratio decides."""
    return {"flattened": "hidden", "joined": "left"}[name]


def flat(model: nn.Module, layout: Layout) -> Tensor:
    return layout.flatten({n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(
    number=st.integers(0, 2),
    sparsity=st.floats(0.05, 0.9),
    seed=st.integers(0, 50),
    share=st.floats(0, 1),
    levels=st.integers(1, 5),
)
def test_counts_stay_exact_after_any_swap(kind: str, number: int, sparsity: float, seed: int, share: float, levels: int) -> None:
    names = MODELS.get(kind, ["flattened", "residual", "joined"])
    _, plan, pattern = pattern_of(kind, names[number % len(names)], sparsity, seed % 3)
    generator = torch.Generator().manual_seed(seed)
    gain, worth = (torch.randint(levels, pattern.keep.shape, generator=generator).double() for _ in range(2))
    keep = pattern.keep
    for _ in range(3):
        grown = pattern.grow(keep, gain, share)
        assert bool((grown | ~keep).all()), "growing takes nothing away"
        new = pattern.exchange(worth, grown, gain)
        assert across(kind) or bool((grown | ~new).all()), "only grown units are kept"
        holds(kind, plan, pattern, new)
        keep, gain, worth = new, worth, gain
    holds(kind, plan, pattern, pattern.select(worth))  # as learning does, from all


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(sparsity=st.floats(0.3, 0.9), seed=st.integers(0, 50), share=st.floats(0, 1))
def test_what_an_earlier_plan_removed_stays_away(kind: str, sparsity: float, seed: int, share: float) -> None:
    """However much it would gain and be worth."""
    model, plan, pattern = pattern_of(kind, MODELS.get(kind, ["flattened"])[0], sparsity, seed % 3)
    generator = torch.Generator().manual_seed(seed)
    alive = pattern.keep | (torch.rand(pattern.keep.shape, generator=generator) < 0.5)
    inside = swaps_inside(pattern.plan(alive), plan, Layout.of(model), CPU, across="within" not in kind)
    gain, worth = (torch.rand(alive.shape, generator=generator).double() + 9 * ~alive for _ in range(2))
    grown = inside.grow(inside.keep, gain, share)
    assert not (grown & ~alive).any()
    for chosen in (inside.exchange(worth, grown, gain), inside.select(worth)):
        assert not (chosen & ~alive).any()
        holds(kind, plan, inside, chosen, alive)


def across(kind: str) -> bool:
    """Whether units change places between layers."""
    return kind.split()[0] in ("channels", "heads", "heads+neurons", "neurons+layers") and "within" not in kind


def holds(kind: str, plan: Plan, pattern: Swaps, keep: Tensor, alive: Tensor | None = None) -> None:
    """Everything that was asked of the plan is so of the swapped one."""
    made = pattern.plan(keep)
    made.check("refined")
    assert {n: k.shape for n, k in made.keep.items()} == {n: k.shape for n, k in plan.keep.items()}
    kept, before = ({n: int(k.sum()) for n, k in p.keep.items()} for p in (made, plan))
    if across(kind):
        fixed = [n for n in kept if any(fnmatchcase(n, pattern) for pattern in plan.provenance.get("ratios", {}))]
        floors = {n: max(plan.block(n) is None, FLOOR * len(k) if "floor" in kind else 0) for n, k in plan.keep.items()}
        assert bool(fixed) == ("ratios" in kind)
        assert all(kept[n] == before[n] for n in fixed)
        assert all(kept[n] >= min(before[n], floors[n]) for n in kept)
        most = weights(plan)
        assert all(now <= then for now, then in zip(weights(made), most, strict=True))
        free = ~keep & (torch.ones_like(keep) if alive is None else alive)
        for unit in free.nonzero().flatten().tolist():
            one_more = pattern.plan(keep.index_fill(0, torch.tensor(unit), True))
            if all(int(k.sum()) == kept[n] for n, k in one_more.keep.items() if n in fixed):
                assert any(now > then for now, then in zip(weights(one_more), most, strict=True)), "there is room for more"
        return
    assert int(keep.sum()) == int(pattern.keep.sum())
    assert sum(kept.values()) == sum(before.values())
    assert made.sparsity() == plan.sparsity()
    if "within" in kind:
        assert all(kept[n] == before[n] for n in kept if plan.block(n) is None), "blocks change places with those of their size"
    if kind == "ratios":
        assert kept["out.weight"] == before["out.weight"]
    if "floor" in kind:
        for name, count in kept.items():
            assert count >= min(before[name], FLOOR * plan.keep[name].numel())
    if kind == "2:4":
        for name, mask in made.keep.items():
            for row, old in zip(mask.flatten(1), plan.keep[name].flatten(1), strict=True):
                assert [int(r.sum()) for r in row.split(4)] == [int(r.sum()) for r in old.split(4)]


def weights(plan: Plan) -> tuple[int, int]:
    """Prunable weights that stay, and all parameters."""
    masks = plan.masks()
    left = {name: int(masks[name].sum()) if name in masks else prod(shape) for name, shape in plan.shapes.items()}
    left = {name: count for name, count in left.items() if name not in plan.provenance["buffers"]}
    return sum(left[name] for name in plan.provenance["prunable"]), sum(left.values())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_limits_select_what_trying_all_sets_finds(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 8))
    parts = data.draw(st.integers(1, 3))
    draw = partial(st.lists, min_size=units, max_size=units)
    part = torch.tensor(data.draw(draw(st.integers(0, parts - 1))))
    keep = torch.tensor(data.draw(draw(st.booleans())))
    low = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=parts, max_size=parts)))
    high = low + torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=parts, max_size=parts)))
    pool = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=parts, max_size=parts)))
    worth = torch.tensor(data.draw(st.permutations([2.0**k for k in range(units)])), dtype=torch.float64)  # sums all differ
    limits = Limits(keep, part, low, high, pool)
    found = limits.select(worth)

    def allowed(chosen: Tensor) -> bool:
        for p in range(parts):
            now, then = int(keep[part == p].sum()), int(chosen[part == p].sum())
            if not min(int(low[p]), now) <= then <= max(int(high[p]), now):
                return False
        return all(int(chosen[pool[part] == q].sum()) == int(keep[pool[part] == q].sum()) for q in range(2))

    sets = [torch.tensor([bool(number >> k & 1) for k in range(units)]) for number in range(2**units)]
    best = max((s for s in sets if allowed(s)), key=lambda s: float(worth[s].sum()))
    assert torch.equal(found, best)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_expanded_units_are_the_plans_masks(kind: str, name: str) -> None:
    model, plan, pattern = pattern_of(kind, name, 0.4)
    layout = Layout.of(model)
    factors = layout.views(pattern.expand(pattern.keep.double()))
    masks = plan.masks()
    for parameter, factor in factors.items():
        expected = masks.get(parameter, torch.ones_like(factor, dtype=torch.bool))
        assert torch.equal(factor, expected.double())
    assert pattern.plan(pattern.keep).digest == plan.digest


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_blame_of_units_sums_to_the_divergence(kind: str, name: str) -> None:
    model, _, pattern = pattern_of(kind, name, 0.4)
    layout = Layout.of(model)
    theta = flat(model, layout)
    x, _ = tiny_data(12, torch.float64)
    with torch.no_grad():
        reference = F.log_softmax(model(x), -1)
    function = ModelFunction(model, layout, target=kl_target)
    step = Segment(0, theta, theta * pattern.expand(pattern.keep.double()), torch.zeros_like(theta))
    found = blame(function, step, [(x, reference)], nodes=32)
    units = pattern.gather(found.values, pattern.keep)
    assert not units[pattern.keep].any()
    assert float(units.sum()) + found.residual == pytest.approx(found.change, rel=1e-9)
    assert abs(found.residual) < 0.05 * found.change


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[0] in ("weights", "block:2x3") or case[0] in GROUPED])
def test_influence_is_that_of_single_gradients(kind: str, name: str) -> None:
    model, plan, pattern = pattern_of(kind, name, 0.4)
    layout = Layout.of(model)
    theta = flat(model, layout) * pattern.expand(pattern.keep.double())
    x, y = tiny_data(9, torch.float64)
    function = ModelFunction(model, layout, target="loss")
    parameters = {e.name for e in layout.parameters}
    expected = torch.zeros(len(pattern.keep), dtype=torch.float64)
    for k in range(len(x)):
        at = theta.clone().requires_grad_()
        gradient = torch.autograd.grad(function(at, x[k : k + 1], y[k : k + 1]).sum(), at)[0]
        one = layout.views(theta * gradient)
        units = []
        for owner in plan.keep:
            if kind == "weights":
                units.append(one[owner].flatten())
                continue
            if kind.startswith("block"):
                rows = one[owner].flatten(1)
                units.append(torch.stack([tile.sum() for band in rows.split(2) for tile in band.split(3, 1)]))
                continue
            total = torch.zeros(len(plan.keep[owner]), dtype=torch.float64)
            for key, index in plan.index.items():
                group, member = key.split("|")
                parameter, axis = member.rsplit("@", 1)
                if group == owner and parameter in parameters:
                    for channel, block in enumerate(index.tolist()):
                        total[channel] += one[parameter].index_select(int(axis), torch.tensor(block)).sum()
            units.append(total)
        expected += torch.cat(units).square()
    engine = choose_engine(function, theta, x, y)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    found = pattern.influence(function, engine, theta, batches)
    if across(kind):  # by the weights that a unit holds where about as many stay
        expected = expected / (pattern.cost / pattern.cost.mean())
    torch.testing.assert_close(found, expected.sqrt(), atol=1e-10, rtol=1e-7)


def test_a_large_unit_leaves_for_many_small_ones() -> None:
    """Heads of one layer against those of another, channels of a wide layer against a narrow one: weights count, not units."""
    _, plan, pattern = pattern_of("channels", "flattened", 0.5)
    owner = torch.cat([torch.full((len(k),), g) for g, k in enumerate(plan.keep.values())])
    counts = []
    for group in range(len(plan.keep)):
        made = pattern.plan(pattern.select((owner == group).double() + torch.linspace(0, 0.5, len(owner))))
        holds("channels", plan, pattern, torch.cat(list(made.keep.values())))
        counts.append([int(k.sum()) for k in made.keep.values()])
    for group, kept in enumerate(counts):
        assert all(kept[group] >= other[group] for other in counts)
    assert len({sum(kept) for kept in counts}) > 1


def test_refined_again_and_again_a_plan_does_not_shrink() -> None:
    """The room is that of the plan which was refined first, unless somebody edited it since."""
    model, plan, pattern = pattern_of("channels", "flattened", 0.5)
    smaller = pattern.plan(pattern.keep & (torch.arange(len(pattern.keep)) % 3 > 0))
    worth = torch.linspace(1, 0, len(pattern.keep), dtype=torch.float64)
    for refined, room in ((smaller, smaller), (replace(smaller, given=plan.keep), plan)):
        again = get_swaps(refined, Layout.of(model), CPU)
        assert again.limits.most == weights_touched(room)
        found = again.plan(again.select(worth))
        assert all(now <= then for now, then in zip(weights(found), weights(room), strict=True))
    edited = replace(smaller, given=plan.keep, provenance={**smaller.provenance, "edited": True})
    assert get_swaps(edited, Layout.of(model), CPU).limits.most == weights_touched(smaller)


def weights_touched(plan: Plan) -> tuple[int, int]:
    """Prunable weights and parameters that stay, of the tensors that lose some; every tensor of this net but one does."""
    untouched = prod(plan.shapes["out.bias"])
    return weights(plan)[0], weights(plan)[1] - untouched


def test_what_has_no_swaps_is_refused() -> None:
    model, plan, _ = pattern_of("weights", "residual", 0.4)
    layout = Layout.of(model)
    for structure, said in (("planets", "planets plans cannot be refined"), ("channels+2:4", "was pruned twice")):
        with pytest.raises(UsageError, match=said):
            get_swaps(Plan(structure, plan.keep, {}, plan.shapes, plan.provenance), layout, CPU)
    with pytest.raises(UsageError, match="a swap needs 2"):
        Runs(plan, layout, CPU, 1)
