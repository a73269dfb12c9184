"""LoRA on a pruned model: what it computes, what it trains, what it leaves alone, and the path that it records."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import PrunekitError, Trajectory, UsageError, make_plan, ranks, score
from prunekit.apply import apply_masks
from prunekit.errors import Note
from prunekit.kernel import ModelFunction, data_scores, reconstruct
from prunekit.steps import Finetuning, Planner, Schedule, Tuner, cut, finetune, prune_by_schedule
from prunekit.steps.low_rank import SCALE, Adapted, LowRank
from prunekit.trajectory import Continued
from tests.conftest import record

RANK, SAMPLES = 2, 24
X = torch.randn(SAMPLES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(SAMPLES) % 3
ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Conv1D(nn.Module):
    """As GPT-2 has it: a linear layer that holds ``(inputs, outputs)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), Conv1D(10, 7), nn.Tanh(), nn.Linear(7, 3)).double()


MOVED = {"0.weight": False, "3.weight": True, "5.weight": False}
"""The weights that are adapted, and whether their inputs come first."""


def how(**options: object) -> Finetuning:
    given = {"epochs": 2, "batch_size": 8, "seed": 4, "lora": RANK, **options}
    return Finetuning(lambda i: (X[i], Y[i]), SAMPLES, lambda m: torch.optim.AdamW(m.parameters(), **ADAM), **given)


def masks_of(model: nn.Module, shares: tuple[float, ...]) -> list[dict[str, Tensor]]:
    """Masks that shrink, by random numbers."""
    draw = torch.Generator().manual_seed(2)
    noise = {name: torch.rand(model.get_parameter(name).shape, generator=draw) for name in MOVED}
    return [{name: values > share for name, values in noise.items()} for share in shares]


def written_out(model: nn.Module, rounds: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """Weights by the definition: ``m ⊙ (W + 2 B A)`` with Adam's formulas for A and B, decay apart from them."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(4)
    factors: dict[str, list[Tensor]] = {}
    for name, turned in MOVED.items():
        outputs, inputs = values[name].T.shape if turned else values[name].shape
        a = torch.randn(RANK, inputs, generator=draw, dtype=torch.float64) / inputs**0.5
        factors[name] = [a, torch.zeros(outputs, RANK, dtype=torch.float64)]
    moments = {name: [(torch.zeros_like(f), torch.zeros_like(f)) for f in pair] for name, pair in factors.items()}
    first, second = ADAM["betas"]
    effective, steps = dict(values), 0

    def weights(masks: dict[str, Tensor], leaves: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        product = {name: 2.0 * (b @ a) for name, (a, b) in leaves.items()}
        return {n: masks[n] * (values[n] + (product[n].T if MOVED[n] else product[n])) for n in MOVED}

    for masks, seed in rounds:
        order = torch.Generator().manual_seed(seed)
        for indices in [i for _ in range(2) for i in torch.randperm(SAMPLES, generator=order).split(8)]:
            leaves = {n: [f.clone().requires_grad_() for f in pair] for n, pair in factors.items()}
            outputs = torch.func.functional_call(model, {**values, **weights(masks, leaves)}, X[indices])
            F.cross_entropy(outputs, Y[indices]).backward()
            steps += 1
            for name, pair in leaves.items():
                for k, leaf in enumerate(pair):
                    m, v = moments[name][k]
                    m.mul_(first).add_(leaf.grad, alpha=1 - first)
                    v.mul_(second).add_(leaf.grad**2, alpha=1 - second)
                    step = (m / (1 - first**steps)) / ((v / (1 - second**steps)).sqrt() + ADAM["eps"])
                    factors[name][k] = factors[name][k] * (1 - ADAM["lr"] * ADAM["weight_decay"]) - ADAM["lr"] * step
        effective |= weights(masks, factors)
    return effective


def test_weights_are_those_of_the_definition_also_while_masks_shrink() -> None:
    model, masks = net(), masks_of(net(), (0.3, 0.6))
    expected = written_out(copy.deepcopy(model), [(masks[0], 5), (masks[1], 6)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Tuner(model, dict(masks[0]), how(), None, {}, list(MOVED)) as tuner:
        tuner.run(seed=5)
        tuner.shrink(masks[1])
        tuner.run(seed=6)
        assert {p.shape for p in tuner.optimizer.state} == {(2, 6), (10, 2), (2, 10), (7, 2), (2, 7), (3, 2)}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-12, rtol=1e-10)
        if name in MOVED:
            assert not parameter[~masks[1][name]].any()
            assert bool((parameter != before[name])[masks[1][name]].all())
        else:
            assert torch.equal(parameter, before[name])


def test_what_comes_back_goes_on_from_its_given_value() -> None:
    model, (fewer, more) = net(), masks_of(net(), (0.6, 0.3))
    dense = {name: model.get_parameter(name).detach().clone() for name in MOVED}
    with Tuner(model, dict(fewer), how(), None, {}) as tuner:
        tuner.run()
        tuner.swap(more, dense)
        start = {name: model.get_parameter(name).detach().clone() for name in MOVED}
        low_rank = tuner.low_rank
        assert low_rank is not None
        before = [f.b.detach() @ f.a.detach() for f in low_rank.factors]
        tuner.run()
        after = [f.b.detach() @ f.a.detach() for f in low_rank.factors]
    for (name, turned), old, new in zip(MOVED.items(), before, after, strict=True):
        came = more[name] & ~fewer[name]
        assert torch.equal(start[name][came], dense[name][came])
        change = SCALE * ((new - old).T if turned else new - old)
        torch.testing.assert_close(model.get_parameter(name).detach(), more[name] * (start[name] + change))


def test_values_trained_are_counted() -> None:
    adapted = Adapted.of(net(), RANK)
    module = LowRank(net(), adapted, 0)
    assert adapted.trained == sum(p.numel() for p in module.parameters()) == 2 * (16 + 17 + 10)
    assert Adapted.of(net(), 7).trained == 6 * 16 + 7 * 17 + 3 * 10  # no layer has more than its inputs and outputs
    assert adapted.facts() == {"rank": 2, "scale": SCALE, "trained": 86, "of": 60 + 70 + 21, "held": {}}


@pytest.mark.parametrize("every", [1, 4])
def test_the_recorded_path_ends_at_the_model_and_goes_on_from_its_parent(tmp_path: Path, every: int) -> None:
    model = net()
    parent = record(tmp_path / "parent", model, torch.optim.AdamW(model.parameters(), lr=0.01), data=(X, Y))
    plan = make_plan(score(parent, model, criterion="magnitude"), model, sparsity=0.5)
    states, tuned = {}, copy.deepcopy(model)
    for steps in (4, 6):
        tuned = copy.deepcopy(model)
        finetune(tuned, plan, how(most=steps, record={"every": every}), tmp_path / f"child-{steps}", parent)
        states[steps] = parent.layout.state(tuned)
    child = Trajectory(tmp_path / "child-6")
    child.verify()
    assert child.header["optimizer"] is None
    assert child.provenance["parent"] == {"trajectory": parent.hash, "step": 12}
    assert len(child) == 6
    assert child.kept == {0, 4, 6} if every == 4 else set(range(7))
    assert torch.equal(child.state(4), states[4])
    assert torch.equal(child.state(-1), states[6])
    path = Continued(parent, child)
    masked = copy.deepcopy(model)
    apply_masks(masked, plan.masks())
    assert torch.equal(path.joint.end, parent.layout.state(masked))
    rebuilt = reconstruct(ModelFunction(tuned, parent.layout), path.segments(), X, Y, tolerance=1e-6)
    torch.testing.assert_close(rebuilt.rebuilt, tuned(X).detach(), atol=1e-4, rtol=0)
    assert "optimizer is not known" in path.rule_note
    with pytest.raises(PrunekitError, match="data-wise scores"):
        data_scores(ModelFunction(tuned, parent.layout), child, X, Y, lambda i: (X[list(i)], Y[list(i)]))


@pytest.mark.parametrize(
    ("schedule", "structure", "criterion"),
    [("iterative", "unstructured", "influence"), ("gradual", "unstructured", "magnitude"), ("one-shot", "channels", "magnitude")],
)
def test_schedules_and_units(tmp_path: Path, schedule: str, structure: str, criterion: str) -> None:
    """Masks shrink on the way, by scores that look at the path so far; units are cut out in the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    parent = record(tmp_path / "parent", model, torch.optim.SGD(model.parameters(), lr=0.1), data=(X, Y))
    planner = Planner.of(parent, model, [(X, Y)], criterion=criterion, structure=structure, example_inputs=X[:2])
    done = prune_by_schedule(model, planner, 0.5, Schedule(schedule, rounds=2), how=how(), folder=tmp_path / "child")
    named = dict(done.model.named_parameters())
    for name, mask in done.plan.masks().items():
        assert not named[name][~mask].any()
    child = Trajectory(tmp_path / "child")
    assert torch.equal(child.state(-1), child.layout.state(done.model))
    assert sum(s.jump for s in child.segments()) == {"iterative": 1, "gradual": 2, "one-shot": 0}[schedule]
    assert bool(planner.rescored) == (schedule != "one-shot")
    torch.testing.assert_close(cut(done.model, done.plan, X[:2])(X), done.model(X))


def test_weights_that_no_gradient_reaches_are_named() -> None:
    model = net()
    model.append(nn.Linear(3, 3).double())
    model[-1].forward = lambda x: x
    with (
        pytest.warns(Note, match="no gradient came to 6.weight, which stay as they were"),
        Tuner(model, {}, how(), None, {}) as t,
    ):
        t.run()


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out, self.inner = nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 4)
            self.out.weight = self.table.weight

    found = Adapted.of(Tied(), 3)
    assert list(found.shapes) == ["inner.weight"]
    assert found.held == {"table.weight": "an embedding"}
    for model, rank, message in (
        (net(), 0, "lora is 0; the rank must be 1 or more"),
        (net(), 8, "lora is 8, and no weight has so many inputs and outputs: 3.weight is 10 x 7; give 7 at most"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), 1, "no weight to adapt.*0.weight: 4 axes"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), 1, "computes a weight from it"),
        (net().bfloat16(), 1, "0.weight is torch.bfloat16"),
    ):
        with pytest.raises(UsageError, match=message):
            Adapted.of(model, rank)
    model = net()
    with pytest.raises(UsageError, match="record: second_moments"):
        Tuner(model, {}, how(record={"every": 2, "second_moments": True}), None, {})
    other = Finetuning(lambda i: (X[i], Y[i]), SAMPLES, lambda m: torch.optim.SGD(model.parameters(), lr=0.1), lora=1)
    with pytest.raises(UsageError, match="the optimizer trains other parameters"), Tuner(model, {}, other, None, {}):
        pass
    with pytest.raises(UsageError, match="leave lora out"):
        prune_by_schedule(model, Planner.of(Trajectory.of(model), model), 0.5, how=how(), rewind=0)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(UsageError, match="lora trains in one process"):
        Adapted.of(net(), 1)
