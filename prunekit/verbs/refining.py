"""Plans of a run repaired: learnt from its training samples, accepted on its scoring samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prunekit.plan import Plan
from prunekit.recipe import Refine
from prunekit.search import refine
from prunekit.verbs.run_folder import Run


def refining(run: Run, options: Refine) -> Callable[[Plan], Plan]:
    """``prunekit.refine`` as the recipe asks for it, computed on the run's device."""
    learn = run.batches("train", options.samples)
    accept = run.batches("scoring", run.recipe.score.samples)

    def refined(plan: Plan) -> Plan:
        place = next(run.model.parameters()).device
        try:
            return refine(
                plan,
                run.model.to(run.device),
                learn,
                accept=accept,
                seed=run.recipe.seed,
                loss=run.recipe.load_loss(),
                **options.options(),
            )
        finally:
            run.model.to(place)

    return refined


def refining_request(run: Run, options: Refine) -> dict[str, Any]:
    """What decides a refined plan, for reuse."""
    data = {name: run.splits[name].digest() for name in ("train", "scoring")}
    return {**options.model_dump(mode="json"), "data": data}
