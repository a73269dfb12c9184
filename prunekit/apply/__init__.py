"""Plan and model in, pruned model out: masks, surgery, masks held in any training loop, the saved form."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.apply.compensate import compensate
from prunekit.apply.layerwise import layerwise
from prunekit.apply.manifest import Manifest, dense_state, load, save
from prunekit.apply.masks import apply_masks, apply_plan, check_made_for, hold_masks
from prunekit.apply.squeeze import Squeezed, squeeze
from prunekit.apply.surgery import cut_units
from prunekit.batch import Inputs
from prunekit.errors import UsageError
from prunekit.plan import Plan
from prunekit.task import Task
from prunekit.trajectory.bare import bare
from prunekit.trajectory.copies import copied

__all__ = [
    "Manifest", "Squeezed", "apply_masks", "check_made_for", "compensate", "dense_state", "hold_masks", "layerwise", "load",
    "masked", "prune", "save", "squeeze",
]  # fmt: skip


def prune(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    calibration: Any = None,
    accept: Any = None,
    seed: int = 0,
    task: str | Task | None = None,
) -> nn.Module:
    """A pruned copy of ``model``: masked where the plan decides on weights, truly smaller where it decides on units.

    Args:
        model: the weights that the plan was made for, in wrappers (DDP, torch.compile) or without; left as they are. The copy
            is in none.
        example_inputs: one or two samples, needed where units go, to check the result.
        calibration: samples ``(inputs, labels)`` on which the kept weights make up for the removed ones, see ``compensate``;
            None leaves them as they are.
        accept: samples of their own to judge that on; None sets every fourth of ``calibration`` apart.
        seed: of compensation.
        task: what the model is for, for compensation.

    Raises:
        ArtifactError: the plan was made for other weights; both hashes are in the message.
        StructureError: surgery did not give the masked model's outputs.
        UsageError: no ``example_inputs`` where units go.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, make_plan, prune, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> scores = score(Trajectory.of(model), model, criterion="magnitude")
        >>> x = torch.randn(2, 4)
        >>> small = prune(model, make_plan(scores, model, x, sparsity=0.5, structure="channels"), x)
        >>> small[0].out_features
        4
    """
    model = bare(model)
    check_made_for(plan, model)
    if calibration is not None:
        model = compensate(model, plan, calibration, accept=accept, seed=seed, task=task)
    if not plan.smaller:
        return masked(model, plan)
    if example_inputs is None:
        raise UsageError(f"pruning {plan.structure} needs example_inputs (one or two samples) to check the smaller model")
    return cut_units(model, plan, example_inputs)


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A dense copy of ``model`` with everything that the plan removes set to 0; it computes what the smaller model does.

    Where zeros do not say that (experts, blocks that normalise their output), forward hooks do: see ``Plan.stand_ins``.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, make_plan, masked, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> int((masked(model, plan)[0].weight == 0).sum() + (masked(model, plan)[2].weight == 0).sum())  # of 48
        24
    """
    result = copied(model)
    apply_plan(result, plan)
    return result
