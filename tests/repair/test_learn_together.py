"""Mask and weights learnt in the same steps: gradients plain autograd's, counts exact, the dense model untouched, never worse."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunekit import ArtifactError, Plan, Trajectory, UsageError, masked, prune_layerwise
from prunekit.batch import taken
from prunekit.data import Samples
from prunekit.kernel import ModelFunction, reconstruct
from prunekit.repair import Recording, learn_together, streamed
from prunekit.repair.streamed import Streaming, StreamLearning
from prunekit.repair.swaps import get_swaps
from prunekit.repair.together import HOLD, OF_LENGTH, TogetherLearning, seated
from prunekit.repair.track import STATES
from prunekit.task import get_task
from prunekit.task.evaluation import References, evaluate
from prunekit.training.line_search import FACTOR, FIRST, LONGER
from prunekit.trajectory import Continued, Layout
from prunekit.trajectory.copies import copied
from tests.writer import plan_of

TASK = get_task("causal_lm")


def closeness(model: nn.Module, other: nn.Module, texts: Samples) -> float:
    return evaluate(other, texts, TASK, References(model, texts, TASK)).figures()["kl"]


@pytest.mark.parametrize("soft", [False, True])
def test_a_step_is_that_of_two_optimizers_of_plain_torch(model: nn.Module, texts: Samples, soft: bool) -> None:
    """Scores and weights by ``torch.optim.Adam``, the mask a product in the graph, soft or straight through, then held."""
    dense = copied(model).double()
    plan, how = plan_of(dense), Streaming(tokens=10_000, batch=8, soft=soft, lean=False)
    swaps = get_swaps(plan, Layout.of(dense), torch.device("cpu"))
    learning = TogetherLearning(swaps, dense, texts, texts, how, of_weights=0.003, task=TASK)
    x, y = texts.batch(0)
    batches = [taken((x, y), slice(i, i + 8)) for i in range(0, 40, 8)]
    both = learning.begin(iter([[batch] for batch in batches] * 4))

    plain = copied(dense)
    named = dict(plain.named_parameters())
    names = swaps.scaled()
    scores = both.scores.clone().requires_grad_()
    of_scores = torch.optim.Adam([scores], lr=1.0)
    of_weights = torch.optim.Adam(named.values(), lr=1.0)
    held: Tensor | None = None
    for number, gone in enumerate((0.0, 0.3, HOLD, 0.9)):
        learning.step([batches[number]], gone)
        left = max(0.0, 1 - gone / HOLD)
        order = scores.detach().sort(descending=True, stable=True)
        hard = torch.zeros_like(scores).index_fill(0, order.indices[: swaps.count], 1.0)
        held = hard if gone >= HOLD and held is None else held
        level = swaps.level(scores.detach())
        mask = ((scores - level) / (0.05 ** (1 - left))).sigmoid() if soft else hard + scores - scores.detach()
        mask = mask if held is None else held
        factors = dict(zip(names, mask.split([named[name].numel() for name in names]), strict=True))
        values = {name: w * factors[name].view(w.shape) if name in factors else w for name, w in named.items()}
        outputs = TASK.outputs(torch.func.functional_call(plain, values, (batches[number][0],)))
        with torch.no_grad():
            wanted = TASK.outputs(dense(batches[number][0])).log_softmax(-1)
        counted = batches[number][1] != -100
        each = (wanted.exp() * (wanted - outputs.log_softmax(-1))).sum(-1)
        (((each * counted).sum(1) / counted.sum(1)).mean()).backward()
        for optimizer, rate in ((of_scores, learning.rate * left), (of_weights, 0.003 * (1 - gone))):
            optimizer.param_groups[0]["lr"] = rate
            if optimizer is of_weights or held is None:
                optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(both.scores, scores.detach(), rtol=1e-6, atol=1e-8)
        for name, parameter in named.items():
            torch.testing.assert_close(both.live.dense[name], parameter.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("structure", "sparsity"), [("unstructured", 0.7), ("2:4", None), ("block:2x2", 0.5), ("channels", 0.4)])
def test_as_much_stays_and_it_is_never_worse(model: nn.Module, texts: Samples, structure: str, sparsity: float | None) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_of(model, sparsity, structure)
    found, made = learn_together(plan, model, texts, Streaming(tokens=6000, batch=4), accept=texts, task=TASK, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, keep in found.keep.items():
        assert structure != "2:4" or bool((keep.view(-1, 4).sum(1) == 2).all()), name
    kept = {name: int(mask.sum()) for name, mask in found.masks().items()}
    assert sum(kept.values()) <= sum(int(mask.sum()) for mask in plan.masks().values())
    named = dict(made.named_parameters())
    assert all(not bool(named[name][~mask].any()) for name, mask in found.masks().items())
    facts = found.provenance["refine"]
    assert facts["after"]["accept"] < facts["before"]["accept"]
    assert closeness(model, made, texts) == pytest.approx(facts["after"]["accept"], rel=1e-4)
    assert 0 < facts["stream"]["weights"]["rate"] <= FIRST * FACTOR**LONGER
    assert any(not torch.equal(named[name], tensor) for name, tensor in before.items() if name not in found.masks())


def test_what_does_not_help_is_not_taken(model: nn.Module, texts: Samples) -> None:
    plan = plan_of(model, 0.3)
    found, made = learn_together(plan, model, texts, Streaming(tokens=2000, batch=4), accept=texts, task=TASK, rate=50.0)
    assert all(torch.equal(found.keep[name], keep) for name, keep in plan.keep.items())
    for name, parameter in made.named_parameters():
        mask = plan.masks().get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, dict(model.named_parameters())[name] * mask)


def by_layers(model: nn.Module, texts: Samples, structure: str, sparsity: float | None) -> tuple[Plan, nn.Module]:
    ignore = [name for name, _ in model.named_parameters() if name not in plan_of(model).masks()]
    return prune_layerwise(model, texts, method="admm", sparsity=sparsity, structure=structure, ignore=ignore, task=TASK)


@pytest.mark.parametrize(("structure", "sparsity"), [("unstructured", 0.6), ("2:4", None)])
def test_what_a_layerwise_method_leaves_is_begun_with(
    model: nn.Module, texts: Samples, structure: str, sparsity: float | None
) -> None:
    """Mask and weights at the first look are the method's; what it removed would come back with the dense weight."""
    plan, start = by_layers(model, texts, structure, sparsity)
    swaps = get_swaps(plan, Layout.of(model), torch.device("cpu"))
    how = Streaming(tokens=6000, batch=4)
    learning = TogetherLearning(swaps, model, texts, texts, how, start=start, task=TASK)
    looks = learning.looks()
    assert next(looks).accept == pytest.approx(closeness(model, start, texts), rel=1e-4)
    both = learning.begin(learning._stream.shared())
    assert torch.equal(both.masks(), swaps.keep)
    dense, given = dict(model.named_parameters()), dict(start.named_parameters())
    for name, mask in plan.masks().items():
        assert torch.equal(both.live.dense[name], torch.where(mask, given[name], dense[name]))
    assert not learning._soft
    assert learning.rate != Streaming(2000).rate
    found, made = learn_together(plan, model, texts, how, accept=texts, start=start, task=TASK, seed=1)
    facts = found.provenance["refine"]
    assert closeness(model, made, texts) == pytest.approx(facts["after"]["accept"], rel=1e-4)
    assert facts["after"]["accept"] < facts["before"]["accept"]
    assert sum(int(mask.sum()) for mask in found.masks().values()) == sum(int(mask.sum()) for mask in plan.masks().values())


def test_where_nothing_helps_the_start_stays(model: nn.Module, texts: Samples) -> None:
    plan, start = by_layers(model, texts, "unstructured", 0.5)
    found, made = learn_together(plan, model, texts, Streaming(2000, batch=4), accept=texts, task=TASK, rate=50.0, start=start)
    assert all(torch.equal(found.keep[name], keep) for name, keep in plan.keep.items())
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in made.state_dict().items())


@pytest.mark.parametrize(("structure", "soft"), [("unstructured", True), ("2:4", False), ("channels", None)])
@pytest.mark.parametrize("every", [1, None])
def test_the_path_leads_from_the_given_mask_to_what_is_taken(
    model: nn.Module, texts: Samples, tmp_path: Path, structure: str, soft: bool | None, every: int | None
) -> None:
    """A state a step, or some; the kernel rebuilds the model along them, and recording changes nothing."""
    plan = plan_of(model, None if structure == "2:4" else 0.5, structure)
    parent, how = Trajectory.of(model), Streaming(tokens=6000, batch=4, soft=soft)
    asked = partial(learn_together, plan, model, texts, how, accept=texts, task=TASK, seed=1)
    found, made = asked(record=Recording(tmp_path / "path", parent, every))
    plain, other = asked()
    assert all(torch.equal(keep, plain.keep[name]) for name, keep in found.keep.items())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in made.state_dict().items())
    child = Trajectory(tmp_path / "path")
    path = Continued(parent, child)
    layout = Layout.of(model)
    assert torch.equal(child.state(0), layout.flatten(masked(model, plan).state_dict()))
    assert torch.equal(child.state(-1), layout.flatten(made.state_dict()))
    steps = found.provenance["refine"]["stream"]["steps"]
    moved = sum(child.step(s).moved for s in range(len(child)))
    assert moved in (steps, steps - 1)  # the last one leads to what is taken, or is gone back from
    assert every == 1 or child.pieces <= STATES + 3
    function = ModelFunction(model, layout, parent.fixed, "loss", task=TASK)
    x, y = texts.batch(0)
    rebuilt = reconstruct(function, path.segments(), x[:4], y[:4], tolerance=1e-4)
    torch.testing.assert_close(rebuilt.rebuilt, function(layout.flatten(made.state_dict()), x[:4], y[:4]), rtol=0, atol=0.02)
    with pytest.raises(ArtifactError, match="already holds a trajectory"):
        asked(record=Recording(tmp_path / "path", parent, every))


def test_where_nothing_is_taken_the_path_goes_back(model: nn.Module, texts: Samples, tmp_path: Path) -> None:
    plan, where = plan_of(model, 0.3), Recording(tmp_path / "path", Trajectory.of(model), 1)
    how = Streaming(tokens=2000, batch=4)
    _, made = learn_together(plan, model, texts, how, accept=texts, task=TASK, rate=50.0, record=where)
    child, layout = Trajectory(where.folder), Layout.of(model)
    assert torch.equal(child.state(-1), layout.flatten(masked(model, plan).state_dict()))
    assert torch.equal(child.state(-1), layout.flatten(made.state_dict()))
    assert not child.step(len(child) - 1).moved


def test_scores_are_dealt_out_anew() -> None:
    """The mask's have the best, and the order among its own, and among the others, is what it was."""
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    found = seated(scores, torch.tensor([False, True, False, True, False]))
    assert found.tolist() == [3.0, 4.0, 2.0, 5.0, 1.0]


def test_scores_move_as_far_as_helps_most(model: nn.Module, texts: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is its share of the length after which the judging samples' divergence is least, among powers of √2."""
    monkeypatch.setattr(streamed, "RATE", 100.0)  # so that the usual one is no bound
    plan = plan_of(model, 0.8)
    start = masked(model, plan)
    swaps = get_swaps(plan, Layout.of(model), torch.device("cpu"))
    learning = TogetherLearning(swaps, model, texts, texts, Streaming(6000, batch=4), start=start, of_weights=1e-3, task=TASK)
    batches = list(islice(learning._stream.shared(), learning.looked))
    both = learning.begin(iter(batches))
    made, named = copied(model).double(), dict[str, Tensor]()
    named.update(made.named_parameters())
    with torch.no_grad():
        for name, value in both.live.dense.items():
            named[name].copy_(value)
    first, second = ({name: torch.zeros_like(named[name]) for name in swaps.scaled()} for _ in range(2))
    for (batch,) in batches:
        factors = {name: swaps.factor(name, swaps.keep).double().requires_grad_() for name in swaps.scaled()}
        values = {name: named[name].detach() * mask for name, mask in factors.items()}
        outputs = TASK.outputs(torch.func.functional_call(made, values, (batch[0],))).log_softmax(-1)
        with torch.no_grad():
            wanted = TASK.outputs(copied(model).double()(batch[0])).log_softmax(-1)
        counted = batch[1] != -100
        (((wanted.exp() * (wanted - outputs)).sum(-1) * counted).sum(1) / counted.sum(1)).mean().backward()
        for name, mask in factors.items():
            assert mask.grad is not None
            first[name] += mask.grad / len(batches)
            second[name] += mask.grad.square() / len(batches)

    def at(length: float) -> float:
        moved = both.scores.double()
        for name in swaps.scaled():
            swaps.factor(name, moved).sub_(first[name] / (second[name].sqrt() + 1e-8), alpha=length)
        keep, other = swaps.select(moved), copied(made)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name in first:
                    parameter.mul_(swaps.factor(name, keep))
        return closeness(model, other.float(), texts)

    here = learning.rate / OF_LENGTH
    assert at(here) < at(0)
    assert min(here / FACTOR, here, here * FACTOR, key=at) == here


def test_scores_never_move_faster_than_a_mask_alone_does(
    model: nn.Module, texts: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TogetherLearning, "_best_move", lambda *_: 100.0)
    plan = plan_of(model, 0.8)
    swaps, stream = get_swaps(plan, Layout.of(model), torch.device("cpu")), Streaming(6000, batch=4)
    alone = StreamLearning(swaps, model, texts, texts, stream, task=TASK).rate
    learning = TogetherLearning(swaps, model, texts, texts, stream, start=masked(model, plan), of_weights=1e-3, task=TASK)
    learning.begin(islice(learning._stream.shared(), learning.looked))
    assert learning.rate == alone


def test_refusals(model: nn.Module, texts: Samples) -> None:
    plan = plan_of(model)
    with pytest.raises(UsageError, match="rate is 0"):
        learn_together(plan, model, texts, Streaming(tokens=2000), task=TASK, rate=0.0)
    with pytest.raises(UsageError, match="give 384 at least"):
        learn_together(plan, model, texts, Streaming(tokens=9), accept=texts, task=TASK)
    cut = copied(model)
    name, parameter = next(iter(model.named_parameters()))
    cut.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], nn.Parameter(parameter[:-1]))
    with pytest.raises(UsageError, match=rf"start has {name} of shape .* masked and not cut"):
        learn_together(plan, model, texts, Streaming(tokens=2000), task=TASK, start=cut)
    with pytest.raises(UsageError, match=f"start has no {name}"):
        learn_together(plan, model, texts, Streaming(tokens=2000), task=TASK, start=nn.Linear(2, 2))
    other = copied(model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ArtifactError, match="was made for model"):
        learn_together(plan, other, texts, Streaming(tokens=2000), task=TASK)
