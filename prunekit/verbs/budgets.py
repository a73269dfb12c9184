"""What a budget means for a run: parameters, MACs, bytes, measured latency, or a measure on validation data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import nn

from prunekit import checkpoint
from prunekit.apply import masked, prune
from prunekit.batch import Inputs, take, to
from prunekit.criteria import score
from prunekit.errors import PrunekitError, UsageError
from prunekit.measure import Speed, noisy, sizes, timed
from prunekit.plan import GROUPED, MissedTarget, Plan, make_plan
from prunekit.recipe import DROPS, TIMES, Prune, Recipe
from prunekit.search.budget import HIGHEST, least, most
from prunekit.steps import Planner, Schedule, prune_by_schedule
from prunekit.structure import pattern_of, prunable_parameters
from prunekit.trajectory import Layout, Trajectory
from prunekit.trajectory.copies import copied
from prunekit.verbs.compensating import compensated
from prunekit.verbs.run_folder import Run
from prunekit.verbs.tuning import finetuning_of
from prunekit.verbs.validation import Validation

Choose = Callable[[float], Mapping[str, Any]]
MakePlan = Callable[[Mapping[str, Any], float], Plan]
MakePlanner = Callable[[Mapping[str, Any]], Planner]
SHORT, LONG, LONGER = 0.5, 6.0, 30.0
"""Seconds of passes, at most, for a try, for its verification, and for one that a noisy machine has left undecided."""
TIMED_HALVINGS, VERIFICATIONS = 8, 8


def within_budget(run: Run, wanted: Prune, choose: Choose, plan: MakePlan, planner: MakePlanner) -> tuple[float, dict[str, Any]]:
    """The sparsity that the budget of ``wanted`` comes to.

    Args:
        choose: sparsity -> criterion, allocation and scores there.
        plan: of these, at a sparsity.
        planner: of these, for pruning in steps.

    Returns:
        sparsity, and for the record the budget, what was reached, and in which unit.

    Raises:
        PrunekitError: nothing that can be planned is within it; says what was reached.
    """
    name, budget = wanted.budget
    if name in DROPS:
        return _by_measure(run, wanted, name, budget, choose, plan, planner)

    def planned(sparsity: float) -> Plan:
        return plan(choose(sparsity), sparsity)

    if name in TIMES:
        return _by_time(run, wanted, planned)
    size = SIZES[name]
    sparsity, reached = least(lambda sparsity: size(run.model, planned(sparsity), run.example), budget)
    if reached > budget:
        raise _too_large(wanted, reached)
    return sparsity, {"budget": {name: budget}, "reached": reached}


def check_budget(wanted: Prune, recipe: Recipe, model: nn.Module, example: Inputs) -> None:
    """Refuses a budget of size that no plan can be within, whatever its criterion, before anything long begins.

    Raises:
        PrunekitError: says what the smallest plan comes to.
    """
    name, budget = wanted.budget
    if name not in SIZES:
        return
    if wanted.structure not in GROUPED:
        layout, kept = Layout.of(model), recipe.prunable
        prunable = set(prunable_parameters(model, layout, kept.ignore, kept.include))
        free = sum(entry.size for entry in layout.parameters if entry.name in prunable)
        pattern = pattern_of(wanted.structure)
        tile = pattern.first * pattern.second if pattern is not None else 0  # what goes is a whole number of them
        reached = max(0.0, parameters_of(model) - round(HIGHEST * free) - tile)
    else:
        plan = plan_by_magnitude(wanted, recipe, model, example, HIGHEST)
        if plan.sparsity()["prunable"] >= HIGHEST:
            return  # something is left that could go, and what that is depends on the criterion
        reached = SIZES[name](model, plan, example)
    if reached > budget:
        raise _too_large(wanted, reached)


def plan_by_magnitude(wanted: Prune, recipe: Recipe, model: nn.Module, example: Inputs, sparsity: float) -> Plan:
    """What is asked for, as far as that is known before anything is scored."""
    kept = recipe.prunable
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=kept.ignore, include=kept.include)
    sizes = {key: value for key in ("round_to", "min_units") if (value := getattr(wanted, key)) is not None}
    sizes |= {"uniform": True} if wanted.uniform else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)  # which is told among what stays whole
        return make_plan(
            scores, model, example if wanted.structure in GROUPED else None, sparsity=sparsity, structure=wanted.structure,
            allocation=wanted.allocation or "global", attention=recipe.structure.mappings(), **sizes,
        )  # fmt: skip


def _too_large(wanted: Prune, reached: float) -> PrunekitError:
    name, budget = wanted.budget
    return PrunekitError(f"{name} is {budget:g}; the smallest plan that could be made of {wanted.structure} reaches {reached:g}")


def _by_time(run: Run, wanted: Prune, planned: Callable[[float], Plan]) -> tuple[float, dict[str, Any]]:
    """The least sparsity whose model is fast enough, searched by the ratio to the dense model and verified by a longer look.

    Milliseconds are a ratio too: the dense model's, measured first, to those asked for. So a machine that becomes busier during
    the search slows both sides. A model that was found holds when the low end of its ratio's interval does (on a machine too
    noisy for a narrow one, its median); one that does not gives way to one of which a twentieth of what is left goes too.
    """
    name, budget = wanted.budget
    beside = Beside(run)

    def small(sparsity: float) -> nn.Module:
        return _small(run.model, planned(sparsity), run.example)

    own = timed({"dense": beside.dense}, beside.x, LONG).ms("dense").median if name == "max_latency_ms" else None
    needed = budget if own is None else max(own / budget, 1.0)
    sparsity = 0.0
    if needed > 1:
        sparsity, slowest = least(
            lambda sparsity: 1 / beside.speed(small(sparsity), SHORT)["speedup"], 1 / needed, TIMED_HALVINGS
        )
        if slowest > 1 / needed:
            raise _too_slow(wanted, 1 / slowest, own)
    for _ in range(VERIFICATIONS):
        tried = small(sparsity)
        found = beside.speed(tried, LONG)
        if noisy(found) and found["low"] < needed <= found["high"]:
            found = beside.speed(tried, LONGER)
        if needed <= 1 or (found["speedup"] if noisy(found) else found["low"]) >= needed:
            break
        sparsity = min(1 - (1 - sparsity) * 0.95, HIGHEST)
    if needed > 1 and found["speedup"] < needed:
        raise _too_slow(wanted, found["speedup"], own)
    return sparsity, {
        "budget": {name: budget},
        "reached": found["speedup"] if own is None else own / found["speedup"],
        "speed": found,
    }


def _too_slow(wanted: Prune, speedup: float, own: float | None) -> PrunekitError:
    name, budget = wanted.budget
    reached = f"{speedup:.3g} times the dense model's speed" if own is None else f"{own / speedup:.3g} ms ({own:.3g} dense)"
    return PrunekitError(f"{name} is {budget:g}; the fastest plan that could be made of {wanted.structure} reaches {reached}")


def measured_again(run: Run, facts: Mapping[str, Any], pruned: nn.Module) -> dict[str, Any]:
    """What a budget of time came to in the finished model, where that is another than the one it was searched with."""
    found = Beside(run).speed(pruned, LONG)
    own = facts["reached"] * facts["speed"]["speedup"] if "max_latency_ms" in facts["budget"] else None
    return {"reached": found["speedup"] if own is None else own / found["speedup"], "speed": found}


class Beside:
    """The dense model on a batch of the recipe's last latency size, for others to be timed beside it."""

    def __init__(self, run: Run) -> None:
        if not run.recipe.eval.latency_batches:
            raise UsageError("eval.latency_batches is empty; a budget of time needs a batch size to be measured with")
        self.device, self.batch = run.device, run.recipe.eval.latency_batches[-1]
        self.x = batch_of(run, self.batch)
        self.dense = copied(run.model).to(run.device)

    def speed(self, pruned: nn.Module, seconds: float) -> Speed:
        return timed({"dense": self.dense, "pruned": pruned.to(self.device)}, self.x, seconds).speed("pruned", self.batch)


def batch_of(run: Run, size: int) -> Inputs:
    """So many validation inputs on the run's device, over and over where there are fewer."""
    validation = run.splits["validation"]
    return to(validation.batch([i % len(validation) for i in range(size)])[0], run.device)


def _by_measure(
    run: Run, wanted: Prune, name: str, drop: float, choose: Choose, plan: MakePlan, planner: MakePlanner
) -> tuple[float, dict[str, Any]]:
    """The smallest model whose drop holds with a standard error to spare.

    The search takes the luckiest of many models, so the drop that it sees on validation data is less than what follows on
    other data.
    """
    task, first = run.task, run.task.deciding
    if name == "max_accuracy_drop" and first.name != "accuracy":
        raise UsageError(
            f"--max-accuracy-drop is for tasks that accuracy decides; {task.name} goes by {first.name}, take --max-drop"
        )
    validation = Validation(run)
    dense = validation.dense
    how = finetuning_of(run, wanted) if wanted.trains else None
    start = partial(compensated, run, {}) if wanted.compensate else None
    seen: dict[float, tuple[float, float]] = {}

    def measure(model: nn.Module, sparsity: float) -> float:
        seen[sparsity] = validation.evaluation(model).lost(dense)
        return -sum(seen[sparsity])

    def at(sparsity: float) -> float:
        chosen = choose(sparsity)
        if not wanted.request():
            found = plan(chosen, sparsity)
            return measure(compensated(run, {}, run.model, found) if wanted.compensate else masked(run.model, found), sparsity)
        torch.manual_seed(run.recipe.seed if how is None else how.seed)
        schedule = Schedule(**wanted.schedule.model_dump())
        done = prune_by_schedule(run.model, planner(chosen), sparsity, schedule, how=how, rewind=wanted.rewind, start=start)
        return measure(done.model, sparsity)

    found = most(at, -drop)
    if found is None:
        raise PrunekitError(
            f"{name} is {drop:g}{' points' if first.unit == '%' else ''}; no sparsity that was tried holds it with a standard "
            f"error to spare (dense {first.shown(dense.figures()[first.name])} of {dense.samples} validation samples)"
        )
    lost, error = seen[found[0]]
    return found[0], {"budget": {name: drop}, "measure": first.name, "reached": round(lost, 4), "standard_error": round(error, 4)}


def parameters_of(model: nn.Module) -> int:
    """Parameters of a dense model; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def parameters_left(model: nn.Module, plan: Plan) -> float:
    """Parameters of a dense model that are left: other than those that masks hold at 0, or those of the smaller model."""
    return parameters_of(model) * (1 - plan.sparsity()["all"])


def _small(model: nn.Module, plan: Plan, example: Inputs) -> nn.Module:
    return prune(model, plan, example if plan.smaller else None)


SIZES: Mapping[str, Callable[[nn.Module, Plan, Inputs], float]] = {
    "max_params": lambda model, plan, example: parameters_left(model, plan),
    "max_macs": lambda model, plan, example: sizes(_small(model, plan, example), take(example, slice(0, 1)))["macs"],
    "max_bytes": lambda model, plan, example: file_size(_small(model, plan, example), plan),
}
"""Budgets of size -> what a plan of a dense model comes to."""


def file_size(model: nn.Module, plan: Plan) -> int:
    """Bytes of the model.safetensors that ``apply.save`` would write."""
    state, _ = checkpoint.unique_state({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    return len(safetensors.torch.save(state, checkpoint.metadata(state, {"kind": "model", "plan": plan.digest})))
