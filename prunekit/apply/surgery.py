"""Units taken out for real, and the result checked against the masked model."""

from __future__ import annotations

from torch import nn

from prunekit.apply.masks import apply_masks
from prunekit.batch import Inputs
from prunekit.errors import ArtifactError
from prunekit.plan import Plan
from prunekit.structure.cut import same_as_masked
from prunekit.structure.stand_ins import stand_in
from prunekit.trajectory.copies import copied


def cut_units(model: nn.Module, plan: Plan, example_inputs: Inputs) -> nn.Module:
    """A smaller copy of ``model`` without the units that ``plan`` removes; training mode and grad flags are kept.

    Raises:
        ArtifactError: the plan names modules or sizes that the model does not have.
        StructureError: the small model's outputs are not the masked dense model's.
    """
    masked = copied(model).cpu()
    apply_masks(masked, plan.masks())
    stand_in(masked, {})  # a schedule's, which are on the dense model
    small = copied(masked)
    stand_in(masked, plan.stand_ins())
    try:
        plan.cut(small).carry_out(small)
    except (ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(f"the plan does not fit this model: {error}") from error
    for parameter in small.parameters():
        parameter.grad = None
    same_as_masked(small, masked, example_inputs)
    return small.train(model.training)
