"""Rivals that learn from a stream: gradients are autograd's, counts and patterns exact, the divergence falls, errors too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from prunekit import Trajectory, UsageError, make_plan, masked, score
from prunekit.data import Samples
from prunekit.plan import Plan
from prunekit.plan.patterns import pattern_fault
from prunekit.repair.stream import Stream
from prunekit.search.rivals import leap, maskllm
from prunekit.search.rivals.block_reconstruction import reconstructed
from prunekit.search.rivals.soft_masks import SoftMasks
from prunekit.search.rivals.streamed import STREAMED
from prunekit.structure import pattern_of
from prunekit.task import get_task
from tests.transformer_models import built
from tests.writer import Writer

TASK = get_task("causal_lm")
VOCABULARY = 30


def texts(count: int, seed: int) -> Tensor:
    """Of a language whose next token is mostly one of the last."""
    generator = torch.Generator().manual_seed(seed)
    after = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(VOCABULARY, (count,), generator=generator)]
    for _ in range(11):
        other = torch.randint(VOCABULARY, (count,), generator=generator)
        tokens.append(torch.where(torch.rand(count, generator=generator) < 0.8, after[tokens[-1]], other))
    return torch.stack(tokens, 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made, tokens = Writer(), texts(512, 1)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for step in range(120):
        batch = tokens[step * 32 % 512 :][:32]
        loss = F.cross_entropy(made(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval()


def stream(batch: int = 16) -> Stream:
    tokens = texts(512, 2)
    return Stream(Samples.of([(tokens, tokens)], TASK.batch), batch)


def plan_of(
    model: nn.Module, structure: str = "unstructured", sparsity: float | None = 0.6, criterion: str = "magnitude"
) -> Plan:
    return make_plan(
        score(Trajectory.of(model), model, criterion=criterion, ignore=["embed*", "head*"]), model, sparsity=sparsity,
        structure=structure,
    )  # fmt: skip


def divergence(model: nn.Module, pruned: nn.Module) -> float:
    tokens = texts(200, 3)
    with torch.no_grad():
        dense, other = (each(tokens).log_softmax(-1) for each in (model, pruned))
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def first_batch(model: nn.Module, of: Stream) -> tuple[Tensor, Any]:
    x, y = next(iter(of))
    assert isinstance(x, Tensor)
    with torch.no_grad():
        return x, (TASK.reference(model(x)), y)


def kl_under(model: nn.Module, masks: dict[str, Tensor], x: Tensor, both: Any) -> Tensor:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = {name: state[name] * mask for name, mask in masks.items()}
    return TASK.divergence(functional_call(model, {**state, **weights}, (x,)), both).sum(1).mean()


def test_gates_gradients_are_autograds(model: nn.Module) -> None:
    plan, of = plan_of(model), stream()
    soft = SoftMasks(model, list(plan.keep), of, TASK)
    gates, twin = leap.Gates(plan, soft, 5), leap.Gates(plan, soft, 5)
    batch = first_batch(model, of)
    soft.slopes(gates.draw(0.5), batch, gates.use)
    leaves = {name: each.clone().requires_grad_() for name, each in twin.logits.items()}
    twin_noise = {name: twin._noise(each) for name, each in twin.logits.items()}
    temperature, scale = 4 + 0.5 * (0.05 - 4), 25 + 0.5 * (350 - 25)
    soft_gates = {name: torch.sigmoid((scale * each + twin_noise[name]) / temperature) for name, each in leaves.items()}
    total, kept = sum(k.numel() for k in plan.keep.values()), sum(int(k.sum()) for k in plan.keep.values())
    dense = dict(model.named_parameters())
    sizes = [torch.stack([(g * dense[n].detach()).norm() for n, g in soft_gates.items()]).sum(),
             torch.stack([dense[n].detach().norm() for n in soft_gates]).sum()]  # fmt: skip
    mean = torch.cat([g.flatten() for g in soft_gates.values()]).mean()
    loss = kl_under(model, soft_gates, *batch) + 7 * (mean - kept / total).abs() - 10 * 0.5 * sizes[0] / sizes[1]
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(gates.logits[name].grad, leaf.grad, rtol=2e-3, atol=1e-6)


def test_choices_gradients_are_autograds(model: nn.Module) -> None:
    plan, of = plan_of(model, "2:4", None), stream()
    soft = SoftMasks(model, list(plan.keep), of, TASK)
    patterns = maskllm.patterns_of("2:4")
    choice, twin = (maskllm.Choice(plan, soft, patterns, 5) for _ in range(2))
    batch = first_batch(model, of)
    soft.slopes(choice.draw(0.5), batch, choice.use)
    temperature, scale = 4 + 0.5 * (0.05 - 4), 300
    leaves = {name: each.clone().requires_grad_() for name, each in twin.logits.items()}
    masks = {}
    for name, leaf in leaves.items():
        runs = torch.softmax((scale * leaf + twin._gumbel(leaf)) / temperature, 1) @ patterns
        mask = plan.keep[name].float()
        full = mask.shape[1] // 4 * 4
        masks[name] = torch.cat([runs.view(len(mask), full), mask[:, full:]], 1)
    dense = dict(model.named_parameters())
    size = sum((mask * dense[name].detach()).square().sum() for name, mask in masks.items())
    (kl_under(model, masks, *batch) - 1e-5 * size).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(choice.logits[name].grad, leaf.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("rival", "structure"), [("leap", "unstructured"), ("leap", "2:4"), ("maskllm", "2:4")])
def test_masks_keep_their_number_and_pattern_and_end_closer_to_the_dense_model(
    rival: str, structure: str, model: nn.Module
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_of(model, structure, 0.6 if structure == "unstructured" else None, "random")
    found, pruned = STREAMED[rival](plan, model, stream(), steps=60, task=TASK, rate=1e-2, seed=3)
    assert sum(int(k.sum()) for k in found.keep.values()) == sum(int(k.sum()) for k in plan.keep.values())
    assert all(keep.dtype == torch.bool for keep in found.keep.values())
    pattern = pattern_of(structure)
    assert pattern is None or not any(pattern_fault(keep, pattern) for keep in found.keep.values())
    assert divergence(model, pruned) < 0.7 * divergence(model, masked(model, plan))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.provenance["learnt"]["rival"] == rival
    state = pruned.state_dict()
    assert all(torch.equal(state[name], before[name] * keep) for name, keep in found.keep.items())  # no weight is changed


def test_a_repeat_is_the_same_and_another_seed_is_another(model: nn.Module) -> None:
    plan = plan_of(model, "2:4", None, "random")
    for rival in ("leap", "maskllm"):
        one, two, other = (STREAMED[rival](plan, model, stream(), steps=15, task=TASK, rate=0.02, seed=s)[0] for s in (1, 1, 2))
        assert all(torch.equal(keep, two.keep[name]) for name, keep in one.keep.items())
        assert not all(torch.equal(keep, other.keep[name]) for name, keep in one.keep.items())


def test_logits_start_at_the_given_mask(model: nn.Module) -> None:
    plan = plan_of(model, "2:4", None)
    soft = SoftMasks(model, list(plan.keep), stream(), TASK)
    choice = maskllm.Choice(plan, soft, maskllm.patterns_of("2:4"), 0)
    assert sum(int((mask != plan.keep[n]).sum()) for n, mask in choice.keep().items()) < 0.1 * sum(
        mask.numel() for mask in plan.keep.values()
    )


def test_runs_follow_the_outputs_of_a_turned_weight() -> None:
    weight = torch.randn(10, 3)  # (inputs, outputs): rows of 10 are two runs of 4 and 2 that keep the given mask
    runs = maskllm.Runs(torch.ones(10, 3, dtype=torch.bool), 1, maskllm.patterns_of("2:4"))
    split = runs.split(weight)
    assert torch.equal(split, weight.t()[:, :8].reshape(-1, 4))
    assert torch.equal(runs.mask(split)[:8], weight[:8])
    assert bool((runs.mask(split)[8:] == 1).all())


def test_every_pattern_is_a_choice() -> None:
    for structure, count in (("2:4", 6), ("4:8", 70), ("1:4", 4)):
        found = maskllm.patterns_of(structure)
        assert found.shape[0] == len(found.unique(dim=0)) == count
        assert found.sum(1).unique().tolist() == [int(structure[0])]


def test_blocks_end_closer_to_the_dense_models(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = plan_of(model)
    pruned, errors = reconstructed(plan, model, stream(), steps=40, rate=3e-3)
    assert [each.block for each in errors] == ["blocks.0", "blocks.1"]
    assert all(each.after < 0.7 * each.before for each in errors)
    assert divergence(model, pruned) < 0.5 * divergence(model, masked(model, plan))
    state = pruned.state_dict()
    for name, keep in plan.keep.items():
        assert not state[name][~keep].any()
    assert all(torch.equal(state[name], before[name]) for name in before if not name.startswith("blocks"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in (*model.parameters(), *pruned.parameters()))


def test_a_block_of_the_dense_model_has_no_error(model: nn.Module) -> None:
    plan = plan_of(model, sparsity=0.0)
    _, errors = reconstructed(plan, model, stream(), steps=1, rate=1e-9)
    assert [each.before for each in errors] == [0, 0]


@pytest.mark.slow  # it imports transformers
def test_transformers_models_are_learnt_too() -> None:
    """Blocks that are called with masks, positions and a cache; weights held turned (GPT-2)."""
    made, _ = built("gpt2")
    tokens = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(0))
    of = Stream(Samples.of([({"input_ids": tokens}, tokens)], TASK.batch), 4)
    plan = make_plan(score(Trajectory.of(made), made, criterion="magnitude", ignore=["*wte*"]), made, structure="2:4")
    for rival in STREAMED.values():
        found, pruned = rival(plan, made, of, steps=2, task=TASK)
        assert sum(int(k.sum()) for k in found.keep.values()) == sum(int(k.sum()) for k in plan.keep.values())
        assert all(not pruned.get_parameter(name)[~keep].any() for name, keep in found.keep.items())


class Still(nn.Module):
    """No list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(tokens))
        return found


def refusals(model: nn.Module) -> Iterator[tuple[str, nn.Module, Plan, dict[str, Any], str]]:
    plan = plan_of(model)
    yield "maskllm", model, plan, {}, "maskllm chooses patterns of N:M, and the plan's structure is unstructured"
    yield "maskllm", model, plan_of(model, "8:16", None), {}, "8:16 has 12,870 patterns a run, more than 256"
    yield "leap", model, plan, {"steps": 0}, "steps is 0; it must be a whole number"
    yield "leap", model, plan, {"rate": -1.0}, "rate is -1.0; it must be above 0"
    still = Still()
    plan = make_plan(score(Trajectory.of(still), still, criterion="magnitude"), still, sparsity=0.5)
    yield "block-reconstruction", still, plan, {}, "no nn.ModuleList"


def test_what_cannot_be_learnt_is_refused_by_name(model: nn.Module) -> None:
    for rival, of, plan, options, said in refusals(model):
        with pytest.raises(UsageError, match=said):
            STREAMED[rival](plan, of, stream(), **{"steps": 2, "task": TASK, **options})
