"""What a budget means for a run: parameters, MACs, bytes, measured latency, or a measure on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import nn

from prunekit import checkpoint
from prunekit.apply import masked, prune
from prunekit.batch import take, to
from prunekit.errors import PrunekitError, UsageError
from prunekit.measure import latencies, sizes
from prunekit.plan import Plan
from prunekit.recipe import DROPS, Prune
from prunekit.search.budget import least, most
from prunekit.steps import Planner, Schedule, prune_by_schedule
from prunekit.task.evaluation import References, evaluate
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scheduling import finetuning_of

Choose = Callable[[float], Mapping[str, Any]]
MakePlan = Callable[[Mapping[str, Any], float], Plan]
MakePlanner = Callable[[Mapping[str, Any]], Planner]


def within_budget(run: Run, wanted: Prune, choose: Choose, plan: MakePlan, planner: MakePlanner) -> tuple[float, dict[str, Any]]:
    """The sparsity that the budget of ``wanted`` comes to.

    Args:
        choose: sparsity -> criterion, allocation and scores there.
        plan: of these, at a sparsity.
        planner: of these, for pruning in steps.

    Returns:
        sparsity, and for the record the budget, what was reached, and in which unit.

    Raises:
        UsageError: masks cannot meet it, since zeros do not shrink what dense kernels do.
        PrunekitError: nothing that can be planned is within it; says what was reached.
    """
    name, budget = wanted.budget
    if name in DROPS:
        return _by_measure(run, wanted, name, budget, choose, plan, planner)
    size: Callable[[Plan], float]
    if name == "max_params":
        size = partial(parameters_left, run)
    else:
        size = {"max_macs": _macs, "max_bytes": _bytes, "max_latency_ms": _latency}[name](run)

    def at(sparsity: float) -> float:
        found = plan(choose(sparsity), sparsity)
        if found.masking and name != "max_params":
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option}: zeros change nothing of this in dense kernels; take --structure channels, heads or layers"
            )
        return size(found)

    sparsity, reached = least(at, budget)
    if reached > budget:
        raise PrunekitError(
            f"{name} is {budget:g}; the smallest plan that could be made of {wanted.structure} reaches {reached:g}"
        )
    return sparsity, {"budget": {name: budget}, "reached": reached}


def _by_measure(
    run: Run, wanted: Prune, name: str, drop: float, choose: Choose, plan: MakePlan, planner: MakePlanner
) -> tuple[float, dict[str, Any]]:
    """The smallest model whose drop holds with a standard error to spare.

    The search takes the luckiest of many models, so the drop that it sees on validation data is less than what follows on
    other data.
    """
    task, samples = run.task, run.batches("validation")
    first = task.deciding
    if name == "max_accuracy_drop" and first.name != "accuracy":
        raise UsageError(
            f"--max-accuracy-drop is for tasks that accuracy decides; {task.name} goes by {first.name}, take --max-drop"
        )
    references = None if task.measures else References(run.model, samples, task)
    dense = evaluate(run.model, samples, task, references)
    how = finetuning_of(run, wanted) if wanted.trains else None
    seen: dict[float, tuple[float, float]] = {}

    def measure(model: nn.Module, sparsity: float) -> float:
        seen[sparsity] = evaluate(model, samples, task, references).lost(dense)
        return -sum(seen[sparsity])

    def at(sparsity: float) -> float:
        chosen = choose(sparsity)
        if not wanted.request():
            return measure(masked(run.model, plan(chosen, sparsity)), sparsity)
        torch.manual_seed(run.recipe.seed if how is None else how.seed)
        schedule = Schedule(**wanted.schedule.model_dump())
        done = prune_by_schedule(run.model, planner(chosen), sparsity, schedule, how=how, rewind=wanted.rewind)
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


def parameters_left(run: Run, plan: Plan) -> float:
    """Parameters that are left: other than those that masks hold at 0, or those of the smaller model."""
    return parameters_of(run.model) * (1 - plan.sparsity()["all"])


def _small(run: Run, plan: Plan) -> nn.Module:
    return prune(run.model, plan, run.example if plan.smaller else None)


def _macs(run: Run) -> Callable[[Plan], float]:
    return lambda plan: sizes(_small(run, plan), take(run.example, slice(0, 1)))["macs"]


def _bytes(run: Run) -> Callable[[Plan], float]:
    return lambda plan: file_size(_small(run, plan), plan)


def file_size(model: nn.Module, plan: Plan) -> int:
    """Bytes of the model.safetensors that ``apply.save`` would write."""
    state, _ = checkpoint.unique_state({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    return len(safetensors.torch.save(state, checkpoint.metadata(state, {"kind": "model", "plan": plan.digest})))


def _latency(run: Run) -> Callable[[Plan], float]:
    """Median milliseconds of a batch of the recipe's last latency size, on this machine, now."""
    validation = run.splits["validation"]
    size = run.recipe.eval.latency_batches[-1]
    x = to(validation.batch([i % len(validation) for i in range(size)])[0], run.device)
    return lambda plan: latencies({"pruned": _small(run, plan).to(run.device)}, x, seconds=0.5)["pruned"]
