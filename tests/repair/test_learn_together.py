"""Mask and weights learnt in the same steps: gradients plain autograd's, counts exact, the dense model untouched, never worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunekit import ArtifactError, UsageError
from prunekit.batch import taken
from prunekit.data import Samples
from prunekit.repair import learn_together
from prunekit.repair.streamed import Streaming
from prunekit.repair.swaps import get_swaps
from prunekit.repair.together import HOLD, TogetherLearning
from prunekit.task import get_task
from prunekit.task.evaluation import References, evaluate
from prunekit.training.line_search import FACTOR, FIRST, LONGER
from prunekit.trajectory import Layout
from prunekit.trajectory.copies import copied
from tests.writer import plan_of

TASK = get_task("causal_lm")


@pytest.mark.parametrize("soft", [False, True])
def test_a_step_is_that_of_two_optimizers_of_plain_torch(model: nn.Module, texts: Samples, soft: bool) -> None:
    """Scores and weights by ``torch.optim.Adam``, the mask a product in the graph, soft or straight through, then held."""
    dense = copied(model).double()
    plan, how = plan_of(dense), Streaming(tokens=10_000, batch=8, soft=soft, lean=False)
    swaps = get_swaps(plan, Layout.of(dense), torch.device("cpu"))
    learning = TogetherLearning(swaps, dense, texts, texts, how, rate=0.003, task=TASK)
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
        for optimizer, rate in ((of_scores, how.rate * left), (of_weights, 0.003 * (1 - gone))):
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
    measured = evaluate(made, texts, TASK, References(model, texts, TASK)).figures()["kl"]
    assert measured == pytest.approx(facts["after"]["accept"], rel=1e-4)
    assert 0 < facts["stream"]["weights"]["rate"] <= FIRST * FACTOR**LONGER
    assert any(not torch.equal(named[name], tensor) for name, tensor in before.items() if name not in found.masks())


def test_what_does_not_help_is_not_taken(model: nn.Module, texts: Samples) -> None:
    plan = plan_of(model, 0.3)
    found, made = learn_together(plan, model, texts, Streaming(tokens=2000, batch=4), accept=texts, task=TASK, rate=50.0)
    assert all(torch.equal(found.keep[name], keep) for name, keep in plan.keep.items())
    for name, parameter in made.named_parameters():
        mask = plan.masks().get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, dict(model.named_parameters())[name] * mask)


def test_refusals(model: nn.Module, texts: Samples) -> None:
    plan = plan_of(model)
    with pytest.raises(UsageError, match="rate is 0"):
        learn_together(plan, model, texts, Streaming(tokens=2000), task=TASK, rate=0.0)
    with pytest.raises(UsageError, match="two batches"):
        learn_together(plan, model, texts, Streaming(tokens=9), accept=texts, task=TASK)
    other = copied(model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ArtifactError, match="was made for model"):
        learn_together(plan, other, texts, Streaming(tokens=2000), task=TASK)
