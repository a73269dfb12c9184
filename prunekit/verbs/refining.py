"""Plans of a run repaired: learnt from its training samples, accepted on its scoring samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.apply import masked
from prunekit.errors import UsageError
from prunekit.measure import merit
from prunekit.plan import Plan
from prunekit.recipe import Refine, Refinement
from prunekit.repair import refine
from prunekit.steps import RefineAgain
from prunekit.steps.planner import MakeSwaps
from prunekit.task.evaluation import References, evaluate
from prunekit.verbs.compensating import compensated
from prunekit.verbs.run_folder import Run


@dataclass
class Seconds:
    """What is left of a command's time to refine in, dealt out evenly over the plans that it may still refine.

    Attributes:
        left: seconds; None for no limit.
        plans: how many may still come.
    """

    left: float | None
    plans: int = 1

    @contextmanager
    def share(self) -> Iterator[float | None]:
        """The next plan's seconds; what it does not take is the later ones'."""
        started = time.monotonic()
        try:
            yield None if self.left is None else self.left / max(1, self.plans)
        finally:
            self.plans -= 1
            if self.left is not None:
                self.left = max(0.0, self.left - (time.monotonic() - started))


def refining(run: Run, options: Refinement, seconds: Seconds | None = None) -> Callable[..., Plan]:
    """``prunekit.refine`` as asked for, computed on the run's device.

    Args:
        seconds: in the place of the options' budget, where several plans share it.

    Its arguments: a plan, the model that it was made for (the dense one by default), ``refine``'s ``swaps`` and ``reference``.
    """
    learn = run.batches("train", None if options.stream else options.samples)
    accept = run.batches("scoring", run.recipe.score.samples)

    def refined(
        plan: Plan, model: nn.Module | None = None, swaps: MakeSwaps | None = None, reference: nn.Module | None = None
    ) -> Plan:
        chosen = run.model if model is None else model
        asked = options.options()
        with (
            run.lent(chosen, *([] if reference is None else [reference])),
            (seconds or Seconds(asked["budget_seconds"])).share() as budget,
        ):
            return refine(
                plan,
                chosen,
                learn,
                accept=accept,
                seed=run.recipe.seed,
                task=run.task,
                swaps=swaps,
                reference=reference,
                **{**asked, "budget_seconds": budget},
            )

    return refined


def refining_again(
    run: Run, options: Refine, swaps: MakeSwaps | None = None, seconds: Seconds | None = None
) -> RefineAgain | None:
    """What ``prune_by_schedule`` takes to refine again; None where it is not asked for.

    Ctrl-C ends the command: what a search has found by then is not worth training on unasked.
    """
    if not options.again:
        return None
    refined = refining(run, options, seconds)

    def again(plan: Plan, base: nn.Module, dense: nn.Module) -> Plan:
        found = refined(plan, base, swaps, reference=dense)
        if found.provenance["refine"]["ended"] == "interrupted":
            raise KeyboardInterrupt
        return found

    return RefineAgain(options.again, again)


def refining_request(run: Run, options: Refinement) -> dict[str, Any]:
    """What decides a refined plan, for reuse."""
    splits = ["train", "scoring", *(["validation"] if isinstance(options, Refine) and options.when == "better" else [])]
    asked = options.model_dump(mode="json")
    if not asked.get("again"):
        asked.pop("again", None)  # plans from before it could be asked for are still what they were
    if options.stream is not None:
        asked["stream"] = options.stream.request()
    return {**asked, "data": {name: run.splits[name].digest() for name in splits}}


def better_plan(
    run: Run,
    plan: Plan,
    options: Refine,
    compensating: bool,
    model: nn.Module,
    swaps: MakeSwaps | None,
    seconds: Seconds | None = None,
) -> tuple[Plan, str]:
    """The refined plan; where it is only to be ``better``, the one whose model is better on validation data, which says so.

    Args:
        compensating: judge the models after compensation, as they will be written; training comes later and is not waited for.
        model: that the plan was made for: the dense one, or the one in work where a schedule prunes it further.
        swaps: as in ``prunekit.refine``.

    Returns:
        the plan, and how refining ended; "" where it was not tried.
    """
    judged = options.when == "better"

    def noted(plan: Plan, kept: bool, **facts: Any) -> Plan:
        return plan.saying(refine_tried={"kept": kept, **facts})

    if judged and all(bool(keep.all()) for keep in plan.keep.values()):
        return noted(plan, False, why="nothing is removed"), ""
    try:
        refined = refining(run, options, seconds)(plan, model, swaps)
    except UsageError as error:
        if not judged:
            raise
        return noted(plan, False, why=str(error).removeprefix("refine: ")), ""
    ended = refined.provenance["refine"]["ended"]
    if not judged:
        return refined, ended
    if ended == "budget" and len(refined.history) == 1:  # the given mask is all there is
        return noted(plan, False, why=f"the budget of {options.budget} was spent before there was a mask to try"), ""
    before, after = (_on_validation(run, each, compensating, model) for each in (plan, refined))
    better = merit(run.task.choosing, after) > merit(run.task.choosing, before)
    return noted(refined if better else plan, better, unrefined=before, refined=after, ended=ended), ended


def _on_validation(run: Run, plan: Plan, compensating: bool, model: nn.Module) -> dict[str, float]:
    """Figures of the plan's model on validation data, closeness to the dense one among them."""
    samples = run.batches("validation")
    weights = compensated(run, {}, model, plan) if compensating else model
    return evaluate(masked(weights, plan), samples, run.task, References(run.model, samples, run.task)).figures()
