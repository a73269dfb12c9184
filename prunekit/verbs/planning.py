"""Plans as they are asked for: of a criterion or the best of several, of units in wanted numbers, and repaired."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from prunekit.criteria import Scores
from prunekit.errors import ArtifactError, Note
from prunekit.plan import GROUPED, Plan, asked_sparsity, make_plan
from prunekit.recipe import DROPS, SIZED, Prune, Refine, Steps, parse_seconds
from prunekit.repair.swaps import get_swaps
from prunekit.reusing import PROBLEM
from prunekit.search import Candidates, Comparison, choose
from prunekit.search.budget import TRIES
from prunekit.steps import Planner, RefineAgain
from prunekit.steps.planner import MakeSwaps
from prunekit.structure import takes_sizes
from prunekit.training.line_search import BATCHES, FACTOR
from prunekit.verbs.compensating import compensation_request
from prunekit.verbs.refining import Seconds, better_plan, refining_again, refining_request
from prunekit.verbs.run_folder import Run, comparison_inputs
from prunekit.verbs.scheduling import planner_for
from prunekit.verbs.tuning import rate_by

Chosen = Mapping[str, Any]
"""``criterion``, ``allocation``, and the criterion's ``scores``."""


class Planning:
    """Everything that plans of one command have in common.

    Args:
        names: of the criteria, whose scores are read; none for all that the run has.

    Attributes:
        request: what decides the pruned model, for reuse; it says so when refining is interrupted.
        training: the part of it that steps and fine-tuning are.

    Raises:
        ArtifactError: a criterion has not been scored.
    """

    def __init__(self, run: Run, wanted: Prune, names: Sequence[str]) -> None:
        self._run, self._wanted, self._names = run, wanted, names
        self._scores = {name: run.scores(name) for name in names} or run.all_scores()
        self._repair, self._swaps = wanted.repair, None if wanted.budget[0] not in SIZED else partial(get_swaps, across=False)
        self._seconds = _seconds(wanted, self._repair)
        self.training = training_request(run, wanted)
        budget, sizes = wanted.budget, _sizes(run, wanted)
        self._options: dict[str, Any] = {
            "ratios": wanted.ratios,
            "floor": wanted.floor,
            "attention": run.recipe.structure.mappings(),
            **sizes,
        }
        self.request: dict[str, Any] = {
            "criterion": names[0] if len(names) == 1 else wanted.criterion,
            "sparsity": None if budget[0] else asked_sparsity(wanted.structure, wanted.sparsity),
            "structure": wanted.structure,
            "allocation": wanted.allocation,
            "scores": {name: scores.digest for name, scores in self._scores.items()},
            **({"classes": list(wanted.classes)} if wanted.classes else {}),
            **({"ratios": dict(wanted.ratios)} if wanted.ratios else {}),
            **({"floor": wanted.floor} if wanted.floor else {}),
            **({budget[0]: budget[1]} if budget[0] else {}),
            **sizes,
            **self.training,
            **({"compensate": compensation_request(run)} if wanted.compensate else {}),
            **({"squeeze": True} if wanted.squeeze else {}),
            **({"refine": refining_request(run, self._repair)} if self._repair is not None else {}),
        }

    def chosen(self, sparsity: float) -> Chosen:
        """The criterion and the allocation: the wanted ones, or those that are best on validation data."""
        wanted, scores = self._wanted, self._scores
        if len(self._names) != 1:
            found = _auto(self._run, scores, wanted.structure, sparsity, wanted.allocation)
        else:
            found = {"criterion": self._names[0], "allocation": wanted.allocation or "global"}
        return {**found, "scores": scores[found["criterion"]]}

    def plan(self, chosen: Chosen, sparsity: float) -> Plan:
        """The plan by scores alone."""
        run, structure = self._run, self._wanted.structure
        example, allocation = run.example if structure in GROUPED else None, chosen["allocation"]
        scores = chosen["scores"]
        return make_plan(
            scores, run.model, example, sparsity=sparsity, structure=structure, allocation=allocation, **self._options
        )

    def repaired_plan(self, chosen: Chosen, sparsity: float) -> Plan:
        """The same, repaired where that is asked for."""
        return self._repaired(self.plan(chosen, sparsity), self._run.model)

    def planner(self, chosen: Chosen) -> Planner:
        """What makes the plans of a schedule's rounds."""
        how = None if self._repair is None else self._repaired
        wanted, allocation = self._wanted, chosen["allocation"]
        return planner_for(self._run, chosen["scores"], wanted.structure, allocation, wanted, self._options, how)

    def again(self) -> RefineAgain | None:
        """What refines again after fine-tuning; None where that is not asked for."""
        return None if self._repair is None else refining_again(self._run, self._repair, self._swaps, self._seconds)

    def _repaired(self, plan: Plan, model: nn.Module, swaps: MakeSwaps | None = None) -> Plan:
        repair, wanted = self._repair, self._wanted
        if repair is None:
            return plan
        if self._swaps is not None:
            swaps = partial(swaps or get_swaps, across=False)
        plan, ended = better_plan(self._run, plan, repair, wanted.compensate, model, swaps, self._seconds)
        if ended == "interrupted" and (wanted.schedule.name != "one-shot" or repair.again):
            raise KeyboardInterrupt  # of a schedule nothing is worth keeping before its last round
        if ended == "interrupted":
            self.request["refine"]["ended"] = ended  # so that it is not taken for what was asked
        return plan


def _seconds(wanted: Prune, repair: Refine | None) -> Seconds | None:
    """The command's time to refine in, over all the plans that it may make; None without a budget.

    These are every plan that a search for a drop tries, and of each every round's.
    """
    if repair is None or repair.budget is None:
        return None
    rounds = 1 if wanted.schedule.name == "one-shot" else wanted.schedule.rounds
    tried = (TRIES + 1 if wanted.budget[0] in DROPS else 1) * (rounds + repair.again)
    return Seconds(parse_seconds(repair.budget), tried)


def training_request(run: Run, steps: Steps | None) -> dict[str, Any]:
    """How a model is pruned in steps and trained, for reuse; nothing where it is not."""
    if steps is None:
        return {}
    found = steps.request()
    if found and (steps.trains or steps.recalibrate) and run.recipe.data is not None:
        found["train"] = run.splits["train"].digest()
        if (by := rate_by(run, steps)) is not None:  # of a search
            judges = {"scoring": run.splits["scoring"].digest(), "samples": run.recipe.score.samples}
            found["rate"] = {"by": by, "batches": BATCHES, "factor": FACTOR, **judges}
    return found


def untrained(plan: Plan) -> Plan:
    """The plan without what was asked of training, where it is applied without: reuse is not to take it for a trained model."""
    request = plan.provenance.get("request", {})
    kept = {key: value for key, value in request.items() if key not in (*Steps.model_fields, "train", "rate")}
    return plan if kept == request else plan.saying(request=kept)


def _auto(run: Run, scores: Mapping[str, Scores], structure: str, sparsity: float, allocation: str | None) -> dict[str, Any]:
    inputs = comparison_inputs(run)
    comparison = None
    if inputs and PROBLEM in inputs:
        raise ArtifactError(f"{inputs[PROBLEM]} (prunekit compare {run.path} --overwrite)")
    for name in (inputs or {}).get("scores", {}):
        if name not in scores and not run.classes:
            text = f"{run.score_path(name)}: no such file, though compare.json was made with it; auto chooses among the others"
            warnings.warn(text, Note, stacklevel=2)
    if inputs and inputs.get("scores") == {n: s.digest for n, s in scores.items()}:
        comparison = Comparison.load(run.path / "compare.json")
    candidates = Candidates(run.model, scores, run.batches("validation"), [structure], run.recipe.structure.mappings(), run.task)
    return choose(candidates, comparison, structure, sparsity, [allocation] if allocation else run.recipe.compare.allocations)


def _sizes(run: Run, wanted: Prune) -> dict[str, Any]:
    """Which numbers of units may stay, where that is not any: the wanted ones, else the recipe's for channels and heads."""
    if not takes_sizes(wanted.structure):
        return {}
    asked = {key: getattr(wanted, key) or getattr(run.recipe.structure, key) for key in ("round_to", "min_units")}
    found: dict[str, Any] = {key: value for key, value in asked.items() if value > 1}
    return found | ({"uniform": True} if wanted.uniform else {})
