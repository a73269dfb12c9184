"""Masks learnt from a stream: counts exact, gradients plain autograd's, the dense model untouched, one language model smaller."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as Columns

from prunekit import UsageError, refine
from prunekit.data import Samples
from prunekit.kernel import ModelFunction
from prunekit.repair.fused_kl import PARTS, fused_kl
from prunekit.repair.hidden import HiddenStates
from prunekit.repair.learner import Learner
from prunekit.repair.limits import Count, best
from prunekit.repair.live import Live
from prunekit.repair.stream import Stream
from prunekit.repair.streamed import RATE, RATE_OF_RUNS, WIDTH, Streaming, StreamLearning
from prunekit.repair.swaps import Runs, get_swaps
from prunekit.task import get_task
from prunekit.task.classification import _kl
from prunekit.trajectory import Layout
from prunekit.trajectory.copies import copied
from prunekit.trajectory.layout import fixed_state
from tests.writer import plan_of

TASK = get_task("causal_lm")


@pytest.mark.parametrize("values", ["spread", "equal", "few"])
def test_the_largest_of_many_are_those_of_a_sort(values: str) -> None:
    generator = torch.Generator().manual_seed(3)
    worth = torch.randn(300_000, generator=generator)
    if values != "spread":
        worth = (worth * (0 if values == "equal" else 2)).round()
    for count in (1, 1000, 150_000, 299_999, 300_000):
        order = worth.sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros(len(worth), dtype=torch.bool).index_fill(0, order, True)
        assert torch.equal(best(worth, count), expected)


def test_a_count_keeps_closed_units_away() -> None:
    worth = torch.arange(10.0)
    limits = Count(torch.arange(10) < 4)
    limits.close(torch.arange(10) == 9)
    assert limits.select(worth).nonzero()[:, 0].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("structure", ["2:4", "5:20"])
def test_runs_keep_their_best(model: nn.Module, structure: str) -> None:
    plan = plan_of(model, structure=structure, sparsity=None)
    size = int(structure.split(":")[1])
    swaps = get_swaps(plan, Layout.of(model), torch.device("cpu"))
    assert isinstance(swaps, Runs)
    worth = torch.randn(len(swaps.keep), generator=torch.Generator().manual_seed(2)).round(decimals=1)
    keep = swaps.select(worth)
    for name, span in swaps.spans.items():
        rows, kept = worth[span].view(plan.keep[name].shape), keep[span].view(plan.keep[name].shape)
        for begin in range(0, rows.shape[1], size):
            run = rows[:, begin : begin + size]
            stay = plan.keep[name][:, begin : begin + size].sum(1)
            order = run.sort(dim=1, descending=True, stable=True).indices
            expected = torch.zeros_like(run, dtype=torch.bool)
            for row, (places, count) in enumerate(zip(order, stay, strict=True)):
                expected[row, places[:count]] = True
            assert torch.equal(kept[:, begin : begin + size], expected)


@pytest.mark.parametrize("structure", ["unstructured", "channels", "block:4x4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_live_models_gradient_is_that_of_the_mask(
    model: nn.Module, texts: Samples, structure: str, checkpointing: bool
) -> None:
    plan = plan_of(model, structure=structure)
    layout = Layout.of(model)
    swaps = get_swaps(plan, layout, torch.device("cpu"))
    function = ModelFunction(model, layout, fixed_state(model, layout), "loss", task=TASK)
    theta = layout.state(model)
    live = Live(function, layout.views(theta), swaps.scaled(), checkpointing=checkpointing)
    units = torch.rand(len(swaps.keep), generator=torch.Generator().manual_seed(4)).requires_grad_()
    x, y = texts.batch(0)
    expected = torch.autograd.grad(function(theta * swaps.expand(units), x, y).sum() / len(texts), units)[0]
    found = torch.zeros_like(expected)

    def use(name: str, gradient: Tensor | None) -> None:
        assert gradient is not None
        swaps.add(name, gradient * live.dense[name], units.detach(), found)

    live.scale(lambda name: swaps.factor(name, units.detach()))
    live.backward([(x, y)], len(texts), use)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_adam_is_torchs(model: nn.Module, texts: Samples) -> None:
    plan, layout = plan_of(model), Layout.of(model)
    swaps = get_swaps(plan, layout, torch.device("cpu"))
    function = ModelFunction(model, layout, fixed_state(model, layout), "loss", task=TASK)
    theta = layout.state(model)
    live = Live(function, layout.views(theta), swaps.scaled())
    learner = Learner(swaps, live, swaps.magnitude(theta))
    mine = learner.scores.clone()
    optimizer = torch.optim.Adam([mine], lr=0.05)
    for _ in range(4):
        mask = swaps.select(mine).float().requires_grad_()
        value = function(theta * swaps.expand(mask), *texts.batch(0)).sum() / len(texts)
        mine.grad = torch.autograd.grad(value, mask)[0]
        optimizer.step()
        assert learner.step([texts.batch(0)], len(texts), 0.05) == pytest.approx(value.item(), rel=1e-5)
    moved = (learner.scores - mine).abs() > 1e-3
    assert moved.float().mean() < 0.01  # the sign of a gradient that is nearly nought is a matter of rounding


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_a_soft_masks_gradient_is_that_of_the_scores(model: nn.Module, texts: Samples, structure: str) -> None:
    plan, layout = plan_of(model, None if structure == "2:4" else 0.5, structure), Layout.of(model)
    swaps = get_swaps(plan, layout, torch.device("cpu"))
    function = ModelFunction(model, layout, fixed_state(model, layout), "loss", task=TASK)
    theta = layout.state(model)
    learner = Learner(swaps, Live(function, layout.views(theta), swaps.scaled()), swaps.magnitude(theta))
    before = learner.scores.clone()
    levels = swaps.levels(before)
    assert levels is not None
    level = torch.cat([levels(name).expand(plan.keep[name].shape).flatten() for name in plan.keep])
    assert torch.equal(before >= level, swaps.select(before))
    scores = before.clone().requires_grad_()
    value = function(theta * swaps.expand(torch.sigmoid((scores - level) / 0.3)), *texts.batch(0)).sum() / len(texts)
    expected = torch.autograd.grad(value, scores)[0]
    assert learner.step([texts.batch(0)], len(texts), 0.05, heat=0.3) == pytest.approx(value.item(), rel=1e-5)
    moved = before - learner.scores  # Adam's first step: the gradient's sign, where it is not as small as ε
    clear = expected.abs() > 1e-5
    torch.testing.assert_close(moved[clear], 0.05 * expected[clear].sign(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("target", ["kl", "hidden", "loss"])
def test_a_stream_lowers_what_it_is_aimed_at(model: nn.Module, texts: Samples, target: str) -> None:
    plan = plan_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = Streaming(tokens=12 * 8 * 40, batch=8, looks=4)
    found = refine(plan, model, texts, accept=texts, task=TASK, target=target, stream=how)
    facts = found.provenance["refine"]
    assert facts["after"]["accept"] < facts["before"]["accept"]
    assert found.counts() != plan.counts()
    assert found.sparsity() == plan.sparsity()
    assert facts["stream"]["tokens"] == how.tokens
    assert facts["stream"]["bytes"]["scores"] < 6.5  # of 12 that scores and Adam's two moments take
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_stream_gives_every_sample_once_a_pass(texts: Samples) -> None:
    tokens = texts.batch(0)[0]
    seen = [x for x, _ in islice(Stream(texts, 8, seed=5), 10)]
    for part in (seen[:5], seen[5:]):
        assert sorted(torch.cat(part).tolist()) == sorted(tokens.tolist())
    assert Stream(texts, 8).tokens() == 8 * 12


def test_too_few_tokens_are_refused(model: nn.Module, texts: Samples) -> None:
    with pytest.raises(UsageError, match="give 384 at least"):
        refine(plan_of(model), model, texts, accept=texts, task=TASK, stream=Streaming(tokens=100))
    with pytest.raises(UsageError, match="tokens is 0"):
        Streaming(tokens=0)


@pytest.mark.parametrize("part", [1, 30, 2**20])
def test_the_fused_divergence_is_the_tasks(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """However many logits are looked at at a time."""
    monkeypatch.setitem(PARTS, "cpu", part)
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator).requires_grad_()
    theirs = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator)
    theirs[0, 0, :3] = -torch.inf  # ruled out
    reference = theirs.log_softmax(-1)
    labels = torch.randint(7, (3, 5), generator=generator).index_fill(1, torch.tensor([4]), -100)
    expected, found = (TASK.divergence_by(kl, logits, (reference, labels)) for kl in (_kl, fused_kl))
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    gradients = [torch.autograd.grad((value * weights).sum(), logits)[0] for value in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_what_is_as_good_as_ruled_out_adds_nothing_to_the_fused_divergence() -> None:
    """Also where the other model rules it out altogether."""
    reference = torch.tensor([[0.0, -1.0, -200.0]]).log_softmax(-1)
    logits = torch.tensor([[0.0, -1.0, -torch.inf]], requires_grad=True)
    found = fused_kl(reference, logits)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros(1), rtol=0, atol=1e-6)
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_soft_gates_of_units_move_by_the_size_of_their_gradients(model: nn.Module, texts: Samples) -> None:
    plan, layout = plan_of(model, 0.4, "channels"), Layout.of(model)
    swaps = get_swaps(plan, layout, torch.device("cpu"))
    function = ModelFunction(model, layout, fixed_state(model, layout), "loss", task=TASK)
    theta = layout.state(model)
    learner = Learner(swaps, Live(function, layout.views(theta), swaps.scaled()), swaps.magnitude(theta), lean=True)
    before = learner.scores.clone()
    scores = before.clone().requires_grad_()
    soft = torch.sigmoid((scores - swaps.level(before)) / 0.5)
    value = function(theta * swaps.expand(soft), *texts.batch(0)).sum() / len(texts)
    expected = torch.autograd.grad(value, scores)[0]
    learner.step([texts.batch(0)], len(texts), 0.05, heat=0.5)
    torch.testing.assert_close(before - learner.scores, 0.05 * expected / expected.square().mean().sqrt(), rtol=1e-2, atol=1e-4)
    assert int((before >= swaps.level(before)).sum()) == int(swaps.select(before).sum())


def test_a_mask_can_stay_close_to_another_model(model: nn.Module, texts: Samples) -> None:
    """By itself as the reference nothing changes; by another, the divergence is that from the other."""
    plan, how = plan_of(model), Streaming(tokens=400, batch=4, looks=2)
    alone, same = (refine(plan, model, texts, task="causal_lm", stream=how, reference=given) for given in (None, model))
    assert all(torch.equal(alone.keep[name], kept) for name, kept in same.keep.items())
    other = copied(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    away = refine(plan, model, texts, task="causal_lm", stream=how, reference=other)
    before, apart = (found.provenance["refine"]["before"]["accept"] for found in (alone, away))
    assert apart != pytest.approx(before, rel=0.01)


@pytest.mark.parametrize(("structure", "rate"), [("unstructured", RATE), ("2:4", RATE_OF_RUNS), ("channels", None)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_the_wider_layers_are_the_smaller_is_the_rate(
    texts: Samples, structure: str, rate: float | None, by_columns: bool
) -> None:
    """Single weights' rate over the number of inputs, whichever axis they lie along; whole units' is the same everywhere."""

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50)
            self.up = Columns(2 * width, width) if by_columns else nn.Linear(width, 2 * width)
            self.down = Columns(width, 2 * width) if by_columns else nn.Linear(2 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.down(torch.relu(self.up(self.embed(x)))))
            return found

    found = []
    for width in (16, 64):
        model = Net(width)
        sparsity = None if structure == "2:4" else 0.5
        swaps = get_swaps(plan_of(model, sparsity, structure), Layout.of(model), torch.device("cpu"))
        found.append(StreamLearning(swaps, model, texts, texts, Streaming(2000, batch=4), task=TASK).rate)
        assert StreamLearning(swaps, model, texts, texts, Streaming(2000, batch=4, rate=0.3), task=TASK).rate == 0.3
    if rate is None:
        assert found == [RATE, RATE]
    else:
        assert found == pytest.approx([rate * WIDTH / 24, rate * WIDTH / 96])  # half the layers have twice as many inputs


@pytest.mark.parametrize("target", ["kl", "hidden"])
def test_a_divergence_under_autocast_is_computed_in_full(model: nn.Module, texts: Samples, target: str) -> None:
    """A small one would be lost: bfloat16 holds three digits, and what differs are the last ones of logits."""
    plan, layout = plan_of(model, 0.5), Layout.of(model)
    found = {}
    for autocast in (False, True):
        swaps = get_swaps(plan, layout, torch.device("cpu"))
        how = Streaming(tokens=12 * 8 * 4, batch=8, autocast=autocast)
        learning = StreamLearning(swaps, model, texts, texts, how, task=TASK, target=target)
        found[autocast] = next(learning.looks()).accept
        learning.close()
    assert found[True] == pytest.approx(found[False], rel=0.04)


def test_the_dense_model_alone_in_bfloat16(model: nn.Module, texts: Samples) -> None:
    """Steps compare with what it says there; masks are judged in single precision."""
    met: list[tuple[bool, torch.dtype]] = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    hook = layer.register_forward_hook(lambda module, given, answer: met.append((torch.is_autocast_enabled("cpu"), answer.dtype)))
    plan = plan_of(model)
    try:
        low = refine(plan, model, texts, accept=texts, task=TASK, stream=Streaming(12 * 8 * 40, 8, autocast="reference"))
    finally:
        hook.remove()
    assert {(True, torch.bfloat16), (False, torch.float32)} == set(met)
    whole = refine(plan, model, texts, accept=texts, task=TASK, stream=Streaming(12 * 8 * 40, 8))
    facts, expected = (each.provenance["refine"] for each in (low, whole))
    assert facts["before"]["accept"] == expected["before"]["accept"]
    assert facts["after"]["accept"] == pytest.approx(expected["after"]["accept"], rel=0.05)
    with pytest.raises(UsageError, match="autocast is 'half'"):
        Streaming(400, autocast="half")  # type: ignore[arg-type]


def test_hidden_states_are_those_that_a_block_gave() -> None:
    """Also where the next block changes them in place."""

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            for block in self.blocks:
                x = block(x)
                x += 1
            return x

    dense, pruned = Adding(), Adding()
    hidden = HiddenStates(dense, pruned)
    x = torch.zeros(2, 3)
    dense(x)
    assert [float(state[0, 0]) for state in hidden.reference()] == [0, 1, 2]
    hidden.close()
