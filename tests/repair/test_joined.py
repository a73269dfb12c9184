"""Units of several kinds learnt as gates: never more weights than the plan keeps, and no unit that went would still fit."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from prunekit import Plan, Trajectory, make_plan, masked, prune, refine, score
from prunekit.data import Samples
from prunekit.repair.streamed import Streaming
from prunekit.task import get_task
from tests.export.conftest import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = get_task("causal_lm")


def kept(plan: Plan) -> int:
    masks = plan.masks()
    return sum(int(masks[n].sum()) if n in masks else prod(plan.shapes[n]) for n in plan.provenance["prunable"])


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["heads+neurons", "heads+neurons+layers"])
@pytest.mark.parametrize("uniform", [False, True])
def test_learnt_gates_keep_the_budget(structure: str, uniform: bool) -> None:
    torch.manual_seed(0)
    model = llama()
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=["*embed*"])
    plan = make_plan(scores, model, tokens(), sparsity=0.5, structure=structure, uniform=uniform)
    text = torch.randint(1, 40, (64, 8), generator=torch.Generator().manual_seed(1))
    texts = Samples.of([(text, text)], TASK.batch)
    options: dict[str, Any] = {"stream": Streaming(3000, batch=8, rate=0.3, looks=4), "task": TASK}
    better = refine(plan, model, texts, **options)
    assert better.history
    told = better.provenance["refine"]
    assert told["kept"] == sum(better.units_left().values())
    assert all(any(n.startswith(f"{b}.") for b in plan.skipped()) for n in plan.keep.keys() - told["moved"].keys())
    assert kept(plan) - 3 * 32 <= kept(better) <= kept(plan)  # within a neuron
    if uniform:  # which takes the place of a budget of weights
        sizes = {name: int(keep.sum()) for name, keep in plan.keep.items() if plan.block(name) is None}
        assert sizes == {name: int(better.keep[name].sum()) for name in sizes}
        assert len(better.skipped()) == len(plan.skipped())
    small = prune(model, better, tokens())
    with torch.no_grad():
        found, expected = small(**tokens()).logits, masked(model, better)(**tokens()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
