"""What of a model can leave whole, for a structure; what cannot is named with its reason."""

from __future__ import annotations

from torch import Tensor, nn

from prunekit.errors import StructureError
from prunekit.structure.channels import traced_groups
from prunekit.structure.cut import Prober
from prunekit.structure.groups import Group, Groups
from prunekit.structure.heads import Mappings, attention_groups
from prunekit.structure.layers import layer_groups
from prunekit.structure.names import GROUPED
from prunekit.trajectory.derived import derived_weights

SHOWN = 5


def find_groups(structure: str, model: nn.Module, example_inputs: Tensor, attention: Mappings = ()) -> Groups:
    """Every group of units that can be cut; each was cut once on a copy, and computed what the masked model does.

    Args:
        structure: ``channels`` (channels and neurons, and the heads of known attention), ``heads`` or ``layers``.
        model: left as it is.
        example_inputs: one or two samples, for tracing and checking.
        attention: projections of attention that its names do not give away, see ``prunekit.structure.heads``.

    Raises:
        StructureError: nothing can be cut; says why, by layer.
        UsageError: ``attention`` names layers that do not exist.
    """
    assert structure in GROUPED
    prober = Prober(model, example_inputs)
    candidates: list[Group] = []
    refused: dict[str, str] = {}
    if structure == "layers":
        candidates, refused = layer_groups(prober)
    else:
        candidates, refused, projections = attention_groups(model, attention)
        if structure == "channels":
            try:
                traced, left_out = traced_groups(model, example_inputs, projections)
            except StructureError as error:
                if not candidates:
                    raise
                traced, left_out = [], {"channels": str(error).removeprefix("channels: ")}
            candidates, refused = traced + candidates, left_out | refused
    found = []
    computed = {one.name: one for one in derived_weights(model)}
    for group in candidates:
        names = [member.rsplit("@", 1)[0] for member in group.members]
        one = next((computed[name] for name in names if name in computed), None)
        fault = (
            f"{one.name} is computed by {one.how}; make it a plain parameter first ({one.removal})"
            if one
            else prober.fault(group)
        )
        if fault is None:
            found.append(group)
        else:
            refused[group.name] = fault
    if not found:
        raise StructureError(f"{structure}: {_nothing(structure, refused)}")
    return Groups(found, refused)


def channel_groups(model: nn.Module, example_inputs: Tensor) -> Groups:
    """``find_groups`` for ``channels``."""
    return find_groups("channels", model, example_inputs)


def _nothing(structure: str, refused: dict[str, str]) -> str:
    if not refused:
        return {
            "channels": "the model has no channels that can be removed (only its output layer has any)",
            "heads": "no attention was found (nn.MultiheadAttention, or q/k/v/o projections beside a number of heads); "
            "name it in the recipe's structure.attention",
            "layers": "no stack of blocks (nn.Sequential or nn.ModuleList) was found",
        }[structure]
    shown = [f"{name or 'the model'}: {reason}" for name, reason in refused.items()]
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"nothing can be removed: {'; '.join(shown[:SHOWN])}{more}"
