"""What every rank of ``tests/repair/test_ranks.py`` runs: repairs of tiny models, in double precision, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from prunekit import Plan, PrunekitError, Trajectory, make_plan, masked, ranks, refine, score
from prunekit.data import Samples
from prunekit.repair import Recording, learn_together
from prunekit.repair.exchange import Exchange
from prunekit.repair.refine import RefineOptions
from prunekit.repair.streamed import Streaming
from prunekit.task import get_task
from tests.structure_models import HANDLED, random_scores
from tests.writer import Writer

SWAPPED = {"unstructured": "residual", "2:4": "residual", "block:2x2": "flattened", "channels": "residual"}
TASK = get_task("causal_lm")


def swapped(structure: str, **options: Any) -> Plan:
    """Learnt from kept samples and swapped; 23 samples in batches of 10, 11 and 2, a quarter of them judging."""
    torch.manual_seed(0)
    model = HANDLED[SWAPPED[structure]]().double().eval()
    x = torch.randn(23, 1, 4, 4, dtype=torch.float64)
    y = torch.arange(23) % 4
    plan = make_plan(random_scores(model), model, x[:2], sparsity=None if structure == "2:4" else 0.5, structure=structure)
    batches = list(zip(x.split([10, 11, 2]), y.split([10, 11, 2]), strict=True))
    return refine(plan, model, batches, RefineOptions(**{"rounds": 2, "steps": 5, **options}))


def streamed(
    structure: str, batch: int, lean: bool, soft: bool | None = None, weights: bool = False, path: Path | None = None
) -> Plan:
    """Learnt from a stream of 41 texts, judged on 7; the mask, or with weights that begin with the masked model's, recorded."""
    torch.manual_seed(0)
    model = Writer(50, hidden=24).eval().double()
    tokens = torch.randint(50, (41, 12), generator=torch.Generator().manual_seed(1))
    texts = Samples.of([(tokens, tokens)], TASK.batch)
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=["embed*", "head*"])
    plan = make_plan(scores, model, tokens[:1], sparsity=0.5, structure=structure)
    how = Streaming(tokens=12 * batch * 7, batch=batch, lean=lean, soft=soft, looks=2)
    if weights:
        record = None if path is None else Recording(path, Trajectory.of(model))
        start = masked(model, plan)
        return learn_together(plan, model, texts, how, accept=texts.first(7), task=TASK, start=start, record=record)[0]
    return refine(plan, model, texts, accept=texts.first(7), task=TASK, stream=how)


def told(plan: Plan) -> dict[str, Any]:
    found = plan.provenance["refine"]
    return {
        "keep": {name: keep.flatten().int().tolist() for name, keep in plan.keep.items()},
        "history": [[line["learn"], line["accept"]] for line in found["history"]],
        "changed": found["changed"],
        "ended": found["ended"],
    }


def repaired(path: Path | None = None) -> dict[str, dict[str, Any]]:
    found = {f"swapped {structure}": told(swapped(structure)) for structure in SWAPPED}
    found["streamed"] = told(streamed("unstructured", 5, lean=False))
    found["streamed, lean and hard"] = told(streamed("unstructured", 5, lean=True, soft=False))
    found["streamed channels"] = told(streamed("channels", 5, lean=True))
    found["streamed with weights"] = told(streamed("unstructured", 5, lean=False, weights=True, path=path))
    found["two samples a step"] = told(streamed("unstructured", 2, lean=True))  # the third of three ranks has none
    found["no time"] = told(swapped("unstructured", budget_seconds=0 if ranks.first() else 1000))
    return found


def exchanged() -> list[list[float]]:
    """Sums of gradients that ranks have in different orders, and of which one rank has not all."""
    like = {f"{n}": torch.zeros(n, 2, dtype=torch.float64 if n == 3 else torch.float32) for n in range(1, 6)}
    taken: dict[str, Any] = {}
    exchange = Exchange(like, taken.__setitem__)
    names = list(like) if ranks.first() else list(like)[::-1]
    for name in names:
        mine = torch.full_like(like[name], 1.0 + ranks.rank())
        exchange.give(name, None if name == "2" and ranks.first() else mine)
    exchange.finish()
    return [taken[name].flatten().tolist() for name in like]


def disagreed() -> str:
    try:
        ranks.alike("the mask", torch.arange(4) > ranks.rank())
    except PrunekitError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.joined():
        path = Path(sys.argv[1], "path")
        content = {"repaired": repaired(path), "exchanged": exchanged(), "disagreed": disagreed()}
        ranks.wait()
        content["pieces"] = Trajectory(path).pieces  # the first rank wrote it
        Path(sys.argv[1], f"{ranks.rank()}.json").write_text(json.dumps(content))
