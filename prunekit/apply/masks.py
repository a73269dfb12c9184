"""Masks on a dense model: set once, or held through any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.criteria import model_digest
from prunekit.errors import ArtifactError
from prunekit.plan import Plan
from prunekit.structure.stand_ins import Wanted, stand_in
from prunekit.trajectory.bare import bare, bare_optimizers, named_tensors
from prunekit.trajectory.derived import check_derived, refresh
from prunekit.trajectory.describe import refuse_strangers


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeroes the removed weights of ``model`` in place.

    Raises:
        ArtifactError: a mask names no parameter or buffer of the model, or has another shape.
        StructureError: a mask is on a parametrised weight, and the weight that is computed from it is not finite (weight_norm
            of a row without weights) or not 0 where the mask removes it.
    """
    zero(named_tensors(model), masks)
    check_derived(model, masks)
    refresh(model)


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Makes ``model`` the masked one in place: removed weights 0, and stand-ins where zeros do not say it (``Plan.stand_ins``).

    Raises:
        ArtifactError, StructureError: see ``apply_masks``.
    """
    apply_masks(model, plan.masks())
    stand_in(model, plan.stand_ins())


def zero(named: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """The same on tensors by name, without looking at weights that are computed from them."""
    for name, mask in masks.items():
        tensor = named.get(name)
        if tensor is None:
            raise ArtifactError(f"mask {name}: the model has no such parameter")
        if tensor.shape != mask.shape:
            raise ArtifactError(f"mask {name}: shape {tuple(mask.shape)}, the parameter's is {tuple(tensor.shape)}")
        if tensor.element_size() == 1 and tensor.is_floating_point():  # float8 has no arithmetic of its own
            tensor.view(torch.uint8).mul_(mask.to(tensor.device, torch.uint8))
        else:
            tensor.mul_(mask.to(tensor.device, tensor.dtype))


def masks_for(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The plan's masks in the model's coordinates: on one that it has cut already only those of single weights."""
    dense = all(plan.shapes.get(name) == tuple(p.shape) for name, p in model.named_parameters())
    return plan.masks() if dense and not plan.skipped() else plan.weight_masks()


def what_goes(model: nn.Module, plan: Plan | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Wanted]:
    """Masks, and what stands in where zeros do not say it: of a plan, or of masks, which are all there is then.

    Of a plan, prunable weights that it leaves whole have a mask too, since they may make up for what goes.
    """
    if not isinstance(plan, Plan):
        return plan, {}
    named = named_tensors(model)
    whole = {name: torch.ones(named[name].shape, dtype=torch.bool) for name in plan.provenance["prunable"] if name in named}
    return {**whole, **plan.masks()}, plan.stand_ins()


@contextmanager
def hold_masks(model: nn.Module, plan: Plan | Mapping[str, Tensor], optimizer: Any) -> Iterator[None]:
    """Keeps removed weights at exactly 0 while ``optimizer`` trains ``model``, whatever loop does it.

    They are zeroed now and after every step. Enter it before a ``Recorder``, so that states are recorded with the
    masks in place.

    Args:
        model: in its wrappers (DDP, torch.compile) or without.
        plan: a plan, or masks by parameter name (True stays). On a model that a plan has cut already, single weights
            that it removes are held; units are gone.
        optimizer: a torch optimizer, one in a wrapper of accelerate's or Lightning's, or a list of several.

    Raises:
        UsageError: an optimizer holds parameters that are not the model's.
        ArtifactError, StructureError: the masks do not fit the model, see ``apply_masks``.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, hold_masks, make_plan, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with hold_masks(model, plan, optimizer):
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> bool(model[0].weight[~plan.masks()["0.weight"]].any())
        False
    """
    model, optimizers = bare(model), bare_optimizers(optimizer)
    for one in optimizers:
        refuse_strangers(model, one)
    masks = masks_for(model, plan) if isinstance(plan, Plan) else plan
    with keep_zero(model, masks, optimizers):
        yield


@contextmanager
def after_steps(optimizers: Sequence[torch.optim.Optimizer], hook: Callable[..., None]) -> Iterator[None]:
    """While inside, ``hook(optimizer, args, kwargs)`` runs after every optimizer's steps."""
    hooks = [one.register_step_post_hook(hook) for one in optimizers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def check_made_for(plan: Plan, model: nn.Module) -> None:
    """Raises ArtifactError unless the plan was made for the model's weights."""
    if plan.provenance["model"] != (found := model_digest(bare(model))):
        raise ArtifactError(f"the plan was made for model {plan.provenance['model']}, this model is {found}")


@contextmanager
def keep_zero(model: nn.Module, masks: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """The same for optimizers whose steps move the model's weights in whatever way; ``masks`` may change on the way.

    Raises:
        ArtifactError, StructureError: see ``apply_masks``.
    """
    apply_masks(model, masks)

    @torch.no_grad()
    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        zero(named_tensors(model), masks)

    with after_steps(optimizers, after_step):
        yield
