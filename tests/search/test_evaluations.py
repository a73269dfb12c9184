"""Evaluations are counted as by hand, through functional calls, torch.func and batched backward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import Recorder, Trajectory, make_plan, refine
from prunekit.criteria import Evidence
from prunekit.data import Samples
from prunekit.kernel import ModelFunction, blame, mean_gradient, mean_value, second_moments
from prunekit.kernel.gradients import VmapGradients, choose_engine
from prunekit.kernel.layer_gradients import LayerwiseGradients
from prunekit.repair.objective import make_objective
from prunekit.repair.swaps import Weights
from prunekit.search.rivals.evaluations import Evaluations, counted
from prunekit.search.rivals.rescored import equal_cost, rescored
from prunekit.search.ways import REPAIRS, RepairSamples, get_repair, settings
from prunekit.task import Classification
from prunekit.trajectory import Layout, Segment
from tests.repair.test_refine import Batches, trained
from tests.structure_models import random_scores

SAMPLES, CLASSES = 96, 4


def made(target: str) -> tuple[ModelFunction, Tensor, Batches]:
    model, batches = trained("flattened")
    layout = Layout.of(model)
    theta = layout.flatten({name: p.detach() for name, p in model.named_parameters()})
    return ModelFunction(model, layout, target=target), theta, batches


def test_means_take_one_gradient_a_sample_whatever_the_targets() -> None:
    function, theta, batches = made("outputs")
    with counted(function.model) as found:
        mean_gradient(function, theta, batches)
        assert (found.gradients, found.forwards) == (SAMPLES, 0)
        mean_value(function, theta, batches)
    assert (found.gradients, found.forwards) == (SAMPLES, SAMPLES)


def test_blame_takes_a_gradient_a_node_and_looks_at_both_ends() -> None:
    function, theta, batches = made("margin")
    with counted(function.model) as found:
        blame(function, Segment(0, theta, theta / 2, torch.zeros_like(theta)), batches, nodes=3)
    assert (found.gradients, found.forwards) == (3 * SAMPLES, 2 * SAMPLES)


@pytest.mark.parametrize(("target", "targets"), [("margin", 1), ("outputs", CLASSES)])
@pytest.mark.parametrize("engine", [LayerwiseGradients, VmapGradients])
def test_moments_take_a_gradient_a_sample_and_target(engine: type, target: str, targets: int) -> None:
    function, theta, batches = made(target)
    uncounted = second_moments(function, theta, batches, engine(function))
    with counted(function.model) as found:
        moments = second_moments(function, theta, batches, engine(function))
    assert torch.equal(uncounted, moments)
    assert found.gradients == SAMPLES * targets
    assert found.forwards == (len(batches) if engine is VmapGradients else 0)  # one sample a batch, to see the targets


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def test_gradients_taken_by_hand() -> None:
    model = Linear(16, 3)
    x = torch.randn(5, 1, 4, 4)
    with counted(model) as found:
        out = model(x)
        torch.autograd.grad(out.sum(), model.weight, retain_graph=True)
        torch.autograd.grad(out, [model.weight], torch.eye(3)[:, None].expand(3, 5, 3), is_grads_batched=True)
        model(x)
        torch.func.jacrev(lambda one: model(one[None])[0])(x[0])
    assert (found.gradients, found.forwards) == (5 + 3 * 5 + 3, 5)
    model(x).sum().backward()
    assert (found.gradients, found.forwards) == (23, 5)  # outside


def chosen(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **options: Any) -> Evaluations:
    """What choosing an engine for the first batch to learn from costs."""
    objective = make_objective(model, batches, "kl", "margin", task=Classification(), **options)
    with counted(objective.ranking.model) as found:
        choose_engine(objective.ranking, objective.theta, *objective.labelled[0])
    return found


def test_a_refinement_costs_what_its_rounds_say() -> None:
    model, batches = trained("flattened")
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    with counted(model) as found:
        done = refine(plan, model, batches, rounds=6, learn=False, nodes=8)
    learn = done.provenance["refine"]["samples"]["learn"]
    rounds = len(done.history) - 1
    assert rounds == 6
    choosing = chosen(model, batches)
    assert found.gradients == learn * (3 * 8 + 3 + 6) + choosing.gradients
    judged = SAMPLES * (1 + rounds)
    dense = SAMPLES + learn  # its outputs, and J there
    assert found.forwards == judged + dense + 3 * 2 * learn + choosing.forwards + 2  # the task is seen from two samples


def test_rescoring_takes_one_gradient_a_sample_and_step() -> None:
    model, batches = trained("flattened")
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    objective = make_objective(model, batches, "kl", "margin", task=Classification())
    with counted(objective.ranking.model) as found:
        rescored(Weights(plan, Layout.of(model), torch.device("cpu")), objective, steps=7)
    assert found.gradients == 7 * sum(len(x) for x, _ in objective.learn) + chosen(model, batches).gradients


@pytest.mark.slow
@pytest.mark.parametrize("samples", [96, pytest.param(3 * 256, marks=pytest.mark.exhaustive)])
def test_rescoring_costs_the_gradients_of_refining(samples: int) -> None:
    """By the defaults of both but that refining goes all its rounds, also where a step of learning sees one batch of several."""
    model, batches = trained("flattened")
    x, y = (torch.cat([pair[i] for pair in batches]).repeat(samples // SAMPLES, *(1,) * (d - 1)) for i, d in ((0, 4), (1, 1)))
    learn, accept = [(x, y)], batches
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    with counted(model) as refined:
        done = refine(plan, model, learn, accept=accept, patience=None)
    assert done.history[-1]["round"] == 30
    with counted(model) as found:
        rescored(
            Weights(plan, Layout.of(model), torch.device("cpu")),
            make_objective(model, learn, "kl", "margin", task=Classification(), accept=accept),
        )
    choosing = chosen(model, learn, accept=accept).gradients  # of an engine: refining looks twice
    assert found.gradients - choosing == refined.gradients - 2 * choosing
    assert (found.gradients - choosing) % samples == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rescored", "rescored-10"])
def test_rescoring_units_takes_a_gradient_a_round(way: str, tmp_path: Path) -> None:
    """As many rounds as refining takes gradients, or ten, but no more than there are units to remove."""
    model, batches = trained("flattened")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Recorder(tmp_path / "t", model, optimizer):
        model(batches[0][0]).sum().backward()
        optimizer.step()
    evidence = Evidence(
        Trajectory(tmp_path / "t"), model, ("conv.weight", "hidden.weight", "out.weight"), Samples.held([batches[0]])
    )
    x = batches[0][0]
    plan = make_plan(random_scores(model), model, x[:2], sparsity=0.98, structure="channels", allocation="uniform")
    gone = sum(int((~keep).sum()) for keep in plan.keep.values())
    assert 10 < gone < equal_cost()
    rounds = gone if way == "rescored" else 10
    with counted(model) as found:
        again = get_repair(way, "channels")(
            plan, model, RepairSamples(evidence, Samples.held(batches[:2]), Samples.held(batches[2:]), x[:2], 0)
        )
    samples = sum(len(x) for x, _ in batches[:2])
    choosing = 2 * (2 * 2) + 2 * samples  # of an engine for each of two batches: on two samples, then in sum on all
    assert found.gradients == rounds * (samples + choosing)
    assert {n: int(k.sum()) for n, k in again.keep.items()} == {n: int(k.sum()) for n, k in plan.keep.items()}


def test_only_what_rescoring_gets_is_part_of_its_key() -> None:
    assert settings("rescored", "unstructured") == {"gradients": equal_cost()}
    assert not any(settings(name, "unstructured") for name in REPAIRS if name != "rescored")
