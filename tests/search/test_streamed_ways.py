"""Ways of language models: as many weights stay, tokens are shared out, zeros stay zeros, and cells are dealt out once each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.operators import declare
from prunekit import Trajectory, UsageError, make_plan, masked, score
from prunekit.data import Samples
from prunekit.models import llama
from prunekit.recipe.study import Repairs
from prunekit.repair.streamed import Streaming
from prunekit.search import streamed_ways
from prunekit.search.streamed_ways import WAYS
from prunekit.search.ways import RepairSamples, get_repair
from prunekit.task import get_task
from prunekit.task.evaluation import References, evaluate
from tests.writer import Writer

TASK = get_task("causal_lm")
TOKENS = 12 * 8 * 30


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Writer(hidden=24).eval()


@pytest.fixture(scope="module")
def material() -> RepairSamples:
    tokens = torch.randint(30, (80, 12), generator=torch.Generator().manual_seed(1))
    samples = Samples.of([(tokens, tokens)], TASK.batch)
    evidence: Any = SimpleNamespace(task=TASK)
    return RepairSamples(evidence, samples, samples.first(16), tokens[:1], 0, Streaming(TOKENS, batch=8, looks=2), samples)


def plan_of(model: nn.Module, structure: str) -> Any:
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=["embed*", "head*"])
    return make_plan(scores, model, sparsity=None if structure == "2:4" else 0.5, structure=structure)


def closeness(model: nn.Module, other: nn.Module, material: RepairSamples) -> float:
    return evaluate(other, material.train, TASK, References(model, material.train, TASK)).figures()["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_every_way_keeps_as_many_and_tuning_helps(model: nn.Module, material: RepairSamples, structure: str) -> None:
    plan = plan_of(model, structure)
    kept: dict[str, float] = {}
    for name in ("streamed", "admm", "tuned", "streamed+tuned", "admm+tuned", "admm+together"):
        found, made = get_repair(name, structure)(plan, model, material)  # type: ignore[misc]
        assert found.sparsity()["prunable"] == pytest.approx(plan.sparsity()["prunable"], abs=1e-9)
        assert (made is None) == (name == "streamed")
        if made is not None:
            kept[name] = closeness(model, made, material)
            for weight, mask in found.masks().items():
                assert not bool(made.get_parameter(weight)[~mask].any())
    assert max(kept["admm+tuned"], kept["admm+together"]) < kept["admm"]


@pytest.mark.slow
def test_units_are_learnt_refitted_and_tuned(material: RepairSamples) -> None:
    declare()
    torch.manual_seed(0)
    model = llama(vocabulary=30, width=16, layers=2, heads=2, kv_heads=2, hidden=24, length=12, tied=True).eval()
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=["*embed*"])
    plan = make_plan(scores, model, material.example, sparsity=0.5, structure="neurons")
    found = {}
    for name in ("refit", "streamed+refit", "streamed+refit+tuned"):
        changed, made = get_repair(name, "neurons")(plan, model, material)  # type: ignore[misc]
        assert made is not None
        assert changed.sparsity()["prunable"] == pytest.approx(plan.sparsity()["prunable"])
        for weight, mask in changed.masks().items():
            assert not bool(made.get_parameter(weight)[~mask].any())
        found[name] = closeness(model, made, material)
    assert found["refit"] < closeness(model, masked(model, plan), material)
    assert Repairs(ways={"neurons": ["refit"]}).stream is None
    with pytest.raises(UsageError, match="refit"):
        get_repair("refit", "unstructured")


def test_tokens_are_shared_out(model: nn.Module, material: RepairSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: dict[str, float] = {}

    def learning(plan: Any, dense: nn.Module, given: RepairSamples, share: float = 1.0) -> Any:
        spent["mask"] = share
        return plan, None

    def tuning(plan: Any, dense: nn.Module, given: RepairSamples, share: float = 1.0, start: Any = None) -> Any:
        spent["weights"] = share
        return plan, dense

    monkeypatch.setattr(streamed_ways, "tuned", tuning)
    streamed_ways.then_tuned(plan_of(model, "2:4"), model, material, way=learning, learns=True)
    assert spent["mask"] + spent["weights"] == pytest.approx(1)
    streamed_ways.then_tuned(plan_of(model, "2:4"), model, material, way=lambda *given: (given[0], None), learns=False)
    assert spent["weights"] == 1


def test_ways_are_refused_where_they_do_not_fit() -> None:
    with pytest.raises(UsageError, match="maskllm"):
        get_repair("maskllm", "unstructured")
    with pytest.raises(UsageError, match="sparsegpt"):
        get_repair("sparsegpt", "heads")
    with pytest.raises(ValueError, match="way leap learns from a stream of tokens"):
        Repairs(ways={"unstructured": ["leap"]})
    assert Repairs(ways={"unstructured": ["admm"]}).stream is None  # it looks at layers
    assert {"streamed+tuned", "sparsegpt+tuned"} <= set(WAYS)
