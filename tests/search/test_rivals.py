"""Rivals keep the right number, repeat themselves, and are what their papers' formulas say."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import make_plan
from prunekit.repair.objective import Objective, make_objective
from prunekit.repair.swaps import Weights
from prunekit.search.rivals import RIVALS
from prunekit.search.rivals.dsnot import dsnot, grow_and_prune
from prunekit.search.rivals.integrated_gradients import integrated_gradients
from prunekit.search.rivals.layer_swaps import layer_swaps, swap_rows
from prunekit.search.rivals.rescored import rescored, tempered
from prunekit.search.rivals.row_wise import Inputs, inputs_of
from prunekit.task import Classification
from prunekit.trajectory import Layout
from tests.repair.test_refine import trained
from tests.structure_models import random_scores


def setting(name: str, sparsity: float = 0.6) -> tuple[nn.Module, Weights, Objective]:
    model, batches = trained(name, torch.float64)
    plan = make_plan(random_scores(model), model, sparsity=sparsity)
    return (
        model,
        Weights(plan, Layout.of(model), torch.device("cpu")),
        make_objective(model, batches, "kl", "margin", task=Classification()),
    )


@pytest.mark.parametrize("name", ["multilayer", "flattened"])
@pytest.mark.parametrize("rival", RIVALS)
def test_the_count_is_exact_and_a_repeat_is_the_same(rival: str, name: str) -> None:
    _, pattern, objective = setting(name)
    options = {"rescored": {"steps": 9}, "edge-popup": {"steps": 12}, "gumbel-gates": {"steps": 12}}.get(rival, {})
    first, second = (RIVALS[rival](pattern, objective, 3, **options) for _ in range(2))
    assert first.dtype == torch.bool
    assert int(first.sum()) == pattern.count
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("rival", ["edge-popup", "gumbel-gates"])
def test_learnt_ones_end_below_magnitude(rival: str) -> None:
    _, pattern, objective = setting("multilayer")
    start = pattern.select(pattern.magnitude(objective.theta))
    before, after = (objective.on_accept(pattern.expand(k.double())) for k in (start, RIVALS[rival](pattern, objective, 0)))
    assert after < 0.8 * before


def margins_squares(model: nn.Module, objective: Objective, theta: Tensor) -> Tensor:
    """``Σ_n (∂ margin_n)²`` sample by sample."""
    total = torch.zeros_like(theta)
    for x, y in objective.labelled:
        for k in range(len(x)):
            at = theta.clone().requires_grad_()
            out = torch.func.functional_call(model, objective.function.layout.views(at), (x[k : k + 1],))[0]
            margin = out[y[k]] - torch.cat([out[: y[k]], out[y[k] + 1 :]]).max()
            total += torch.autograd.grad(margin, at)[0].square()
    return total


def test_tempered_and_rescored_are_their_formula() -> None:
    model, pattern, objective = setting("multilayer")
    theta = objective.theta

    def worth(now: Tensor) -> Tensor:
        return pattern.gather((theta.abs() * now.abs() * margins_squares(model, objective, now).sqrt()).sqrt(), pattern.keep)

    assert torch.equal(tempered(pattern, objective), worth(theta).argsort(descending=True).argsort() < pattern.count)
    middle = round((pattern.count / len(pattern.keep)) ** 0.5 * len(pattern.keep))
    keep = worth(theta).argsort(descending=True).argsort() < middle
    again = worth(theta * pattern.expand(keep.double()))
    assert torch.equal(rescored(pattern, objective, steps=2), again.argsort(descending=True).argsort() < pattern.count)


def test_integrated_gradients_are_their_formula() -> None:
    model, pattern, objective = setting("flattened")
    objective = make_objective(model, [(x, y) for x, y in objective.labelled], "kl", "loss", task=Classification())
    x, y = (torch.cat(part) for part in zip(*objective.labelled, strict=True))
    scores = []
    for name in pattern.names:
        weight = model.get_parameter(name).detach()
        total = torch.zeros_like(weight)
        for k in range(8):
            at = ((k + 0.5) / 8 * weight).requires_grad_()
            loss = F.cross_entropy(torch.func.functional_call(model, {name: at}, (x,)), y)
            total += (weight * torch.autograd.grad(loss, at)[0]).abs() / 8
        scores.append(total.flatten())
    expected = torch.cat(scores).argsort(descending=True).argsort() < pattern.count
    assert torch.equal(integrated_gradients(pattern, objective), expected)


def row_error(w: Tensor, keep: Tensor, moment: Tensor) -> float:
    r = w * ~keep
    return float(r @ moment @ r)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), inputs=st.integers(2, 7), kept=st.integers(0, 7))
def test_swaps_of_a_row_are_the_best_ones(seed: int, inputs: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, inputs), (20, inputs)))
    moment = a.t() @ a
    keep = torch.stack([torch.randperm(inputs, generator=generator) < kept for _ in range(3)])
    one, end = swap_rows(w, keep, moment, 1), swap_rows(w, keep, moment, 1000)
    for row in range(3):

        def neighbours(mask: Tensor, row: int = row) -> list[float]:
            found = [row_error(w[row], mask, moment)]
            for p, q in itertools.product(range(inputs), repeat=2):
                if mask[q] and not mask[p]:
                    other = mask.clone()
                    other[p], other[q] = True, False
                    found.append(row_error(w[row], other, moment))
            return found

        assert row_error(w[row], one[row], moment) == pytest.approx(min(neighbours(keep[row])), rel=1e-9, abs=1e-12)
        stays = neighbours(end[row])
        assert stays[0] <= min(stays) + 1e-9
        assert int(end[row].sum()) == int(keep[row].sum())


def test_layer_swaps_lower_each_layers_own_error() -> None:
    model, pattern, objective = setting("flattened")
    keep = layer_swaps(pattern, objective)
    before, after = pattern.plan(pattern.keep).keep, pattern.plan(keep).keep
    x = torch.cat([x for x, _ in objective.learn])
    inputs = {"conv": x, "hidden": F.relu(model.conv(x)).flatten(1)}
    inputs["out"] = F.relu(model.hidden(inputs["hidden"]))
    for name, a in inputs.items():
        layer, weight = model.get_submodule(name), f"{name}.weight"
        errors = []
        for masks in (before, after):
            changed = torch.func.functional_call(layer, {"weight": layer.weight * masks[weight]}, (a,))
            errors.append(float((changed - layer(a)).detach().square().sum()))
        assert errors[1] < errors[0]
        assert torch.equal(before[weight].flatten(1).sum(1), after[weight].flatten(1).sum(1))
    removed = (model.conv.weight * ~after["conv.weight"]).flatten(1)
    moment = inputs_of(objective)["conv.weight"].gram
    whole = float((F.conv2d(x, model.conv.weight * ~after["conv.weight"], padding=1)).square().sum())
    assert float(((removed @ moment) * removed).sum()) == pytest.approx(whole, rel=1e-9)


def cycled(w: list[float], keep: list[bool], a: Tensor, cycles: int) -> list[bool]:
    """DSnoT of one row, as the paper words it."""
    mean, variance, norm = a.mean(0).tolist(), a.var(0, correction=0).tolist(), a.norm(dim=0).tolist()
    keep = list(keep)
    for _ in range(cycles):
        error = sum(w[k] * mean[k] for k in range(len(w)) if not keep[k])
        if abs(error) <= 0.1:
            return keep
        sign = 1 if error > 0 else -1
        removed = [k for k in range(len(w)) if not keep[k] and sign * w[k] * mean[k] > 0]
        kept = [k for k in range(len(w)) if keep[k] and sign * w[k] * mean[k] < 0]
        if not removed or not kept:
            return keep
        keep[max(removed, key=lambda k: sign * w[k] * mean[k] / variance[k])] = True
        keep[min(kept, key=lambda k: abs(w[k]) * norm[k])] = False
    return keep


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), inputs=st.integers(2, 9), kept=st.integers(0, 9), cycles=st.sampled_from([1, 2, 50]))
def test_dsnot_of_a_row_is_the_papers_rule(seed: int, inputs: int, kept: int, cycles: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, inputs), (20, inputs)))
    a += 0.5
    keep = torch.stack([torch.randperm(inputs, generator=generator) < kept for _ in range(4)])
    found = grow_and_prune(w, keep, Inputs(len(a), a.sum(0), a.t() @ a), cycles)
    assert found.tolist() == [cycled(*row, a, cycles) for row in zip(w.tolist(), keep.tolist(), strict=True)]
    assert torch.equal(found.sum(1), keep.sum(1))


def test_dsnot_looks_at_the_inputs_of_every_layer() -> None:
    model, pattern, objective = setting("flattened")
    before, after = pattern.plan(pattern.keep).keep, pattern.plan(dsnot(pattern, objective)).keep
    x = torch.cat([x for x, _ in objective.learn])
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    hidden = F.relu(model.conv(x)).flatten(1)
    changed = 0
    for name, a in {"conv": patches, "hidden": hidden, "out": F.relu(model.hidden(hidden))}.items():
        weight = model.get_submodule(name).weight.detach().flatten(1)
        keep, found = (masks[f"{name}.weight"].flatten(1) for masks in (before, after))
        expected = [cycled(*row, a.detach(), 50) for row in zip(weight.tolist(), keep.tolist(), strict=True)]
        assert found.tolist() == expected
        changed += int((found != keep).sum())
    assert changed


def test_inputs_of_a_layer_are_its_inputs_statistics() -> None:
    _, _, objective = setting("multilayer")
    x = torch.cat([x for x, _ in objective.learn]).flatten(1)
    found = inputs_of(objective)["one.weight"]
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.variance, x.var(0, correction=0))
    torch.testing.assert_close(found.norm, x.norm(dim=0))
