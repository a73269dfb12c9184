"""Which units there are and which sets of them are allowed: counts exact, nothing lost between units and coordinates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import Plan, UsageError, make_plan
from prunekit.kernel import ModelFunction, blame, divergence
from prunekit.kernel.gradients import choose_engine
from prunekit.search.patterns import Blocks, Channels, Pattern, Weights, get_pattern
from prunekit.trajectory import Layout, Segment
from tests.conftest import tiny_data
from tests.structure_models import HANDLED, IMAGES, random_scores

CPU = torch.device("cpu")
KINDS = ["weights", "blocks", "channels", "channels across"]


def pattern_of(kind: str, name: str, sparsity: float, seed: int = 0) -> tuple[nn.Module, Plan, Pattern]:
    torch.manual_seed(seed)
    model = HANDLED[name]().double()
    model(torch.randn(50, 1, 4, 4, dtype=torch.float64))
    model.eval()
    structure = "channels" if kind.startswith("channels") else "unstructured"
    scores = random_scores(model, seed)
    if kind == "blocks":
        odd = [n for n, v in scores.importance.items() if v.shape[1] % 2]
        scores.provenance["prunable"] = [n for n in scores.importance if n not in odd]
    plan = make_plan(scores, model, IMAGES.double(), sparsity=sparsity, structure=structure)
    layout = Layout.of(model)
    made: Pattern
    if kind == "weights":
        made = Weights(plan, layout, CPU)
    elif kind == "blocks":
        made = Blocks(plan, layout, CPU, 2)
    else:
        made = Channels(plan, layout, CPU, across=kind == "channels across")
    return model, plan, made


def flat(model: nn.Module, layout: Layout) -> Tensor:
    return layout.flatten({n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["flattened", "residual", "joined"]),
    sparsity=st.floats(0.05, 0.9),
    seed=st.integers(0, 50),
    share=st.floats(0, 1),
    levels=st.integers(1, 5),
)
def test_counts_stay_exact_after_any_swap(kind: str, name: str, sparsity: float, seed: int, share: float, levels: int) -> None:
    _, plan, pattern = pattern_of(kind, name, sparsity, seed % 3)
    generator = torch.Generator().manual_seed(seed)
    gain, worth = (torch.randint(levels, pattern.keep.shape, generator=generator).double() for _ in range(2))
    keep = pattern.keep
    for _ in range(3):
        grown = pattern.grow(keep, gain, share)
        assert bool((grown | ~keep).all()), "growing takes nothing away"
        new = pattern.select(worth.masked_fill(~grown, -torch.inf))
        assert bool((grown | ~new).all()), "only grown units are kept"
        assert int(new.sum()) == int(pattern.keep.sum())
        keep, gain, worth = new, worth, gain
    made = pattern.plan(keep)
    made.check("refined")
    assert {n: k.shape for n, k in made.keep.items()} == {n: k.shape for n, k in plan.keep.items()}
    if kind == "channels":
        assert {n: int(k.sum()) for n, k in made.keep.items()} == {n: int(k.sum()) for n, k in plan.keep.items()}
        assert made.sparsity() == plan.sparsity()
    if kind == "channels across":
        assert all(k.any() for k in made.keep.values())
    if kind == "blocks":
        for parameter, mask in made.keep.items():
            for one, other in ((mask, plan.keep[parameter]),):
                by_block = [m.movedim(1, -1).reshape(-1, 2).sum(1) for m in (one, other)]
                assert torch.equal(*by_block)


@pytest.mark.parametrize("name", ["flattened", "residual", "joined"])
@pytest.mark.parametrize("kind", KINDS)
def test_expanded_units_are_the_plans_masks(kind: str, name: str) -> None:
    model, plan, pattern = pattern_of(kind, name, 0.4)
    layout = Layout.of(model)
    factors = layout.views(pattern.expand(pattern.keep.double()))
    masks = plan.masks()
    for parameter, factor in factors.items():
        expected = masks.get(parameter, torch.ones_like(factor, dtype=torch.bool))
        assert torch.equal(factor, expected.double())
    assert pattern.plan(pattern.keep).digest == plan.digest


@pytest.mark.parametrize("name", ["flattened", "residual", "joined"])
@pytest.mark.parametrize("kind", KINDS)
def test_blame_of_units_sums_to_the_divergence(kind: str, name: str) -> None:
    model, _, pattern = pattern_of(kind, name, 0.4)
    layout = Layout.of(model)
    theta = flat(model, layout)
    x, _ = tiny_data(12, torch.float64)
    with torch.no_grad():
        reference = F.log_softmax(model(x), -1)
    function = ModelFunction(model, layout, target=divergence)
    step = Segment(0, theta, theta * pattern.expand(pattern.keep.double()), torch.zeros_like(theta))
    found = blame(function, step, [(x, reference)], nodes=32)
    units = pattern.gather(found.values, pattern.keep)
    assert not units[pattern.keep].any()
    assert float(units.sum()) + found.residual == pytest.approx(found.change, rel=1e-9)
    assert abs(found.residual) < 0.05 * found.change


@pytest.mark.parametrize("name", ["flattened", "residual", "joined"])
@pytest.mark.parametrize("kind", ["weights", "channels"])
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
    torch.testing.assert_close(found, expected.sqrt(), atol=1e-10, rtol=1e-7)


def test_channels_across_layers_have_a_floor() -> None:
    _, plan, pattern = pattern_of("channels across", "residual", 0.3)
    worth = torch.arange(len(pattern.keep), dtype=torch.float64)  # the first layer's channels are worth least
    made = pattern.plan(pattern.select(worth))
    share = sum(int(k.sum()) for k in plan.keep.values()) / sum(len(k) for k in plan.keep.values())
    for keep in made.keep.values():
        assert int(keep.sum()) >= max(1, int(share * len(keep) / 2))


def test_a_structure_without_swaps_and_unfit_blocks_are_refused() -> None:
    model, plan, _ = pattern_of("weights", "residual", 0.4)
    layout = Layout.of(model)
    with pytest.raises(UsageError, match="axis 1 is no multiple of 4"):
        Blocks(plan, layout, CPU, 4)
    with pytest.raises(UsageError, match="planets plans cannot be refined"):
        get_pattern(Plan("planets", plan.keep, {}, plan.shapes, plan.provenance), layout, CPU)
