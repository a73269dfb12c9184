"""What of a model can leave whole, for a structure; what cannot is named with its reason."""

from __future__ import annotations

from torch import nn

from prunekit.batch import Inputs
from prunekit.errors import StructureError
from prunekit.structure.channels import traced_groups
from prunekit.structure.cut import Prober
from prunekit.structure.groups import Group, Groups
from prunekit.structure.heads import Mappings, attention_groups
from prunekit.structure.layers import layer_groups
from prunekit.structure.names import GROUPED

SHOWN = 5


def find_groups(structure: str, model: nn.Module, example_inputs: Inputs, attention: Mappings = ()) -> Groups:
    """Every group of units that can be cut; all were cut once on a copy, and computed what the masked model does.

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
    if structure == "layers":
        found, refused = _checked(prober, *layer_groups(prober))
    else:
        heads, refused, projections, others = attention_groups(model, attention)
        traced: list[Group] = []
        if structure == "channels":
            try:
                traced, left_out = traced_groups(prober.model, prober.inputs, projections)
                refused = left_out | refused
            except StructureError as error:
                traced, refused = [], {"channels": str(error).removeprefix("channels: "), **refused}
        found, refused = _checked(prober, traced, refused)  # apart: a replaced module may allow what the given one does not
        if failed := {group.name.partition("#")[0] for group in traced} & refused.keys():
            found, refused = _evenly(prober, found, refused, failed, projections)
        whole, refused = _checked(prober, heads, refused)
        more, _ = _checked(prober, [group for group in others if group.name in refused], {})
        found += whole + more
        for group in more:
            del refused[group.name]
    if not found:
        raise StructureError(f"{structure}: {_nothing(structure, refused)}")
    return Groups(found, refused)


def _checked(prober: Prober, groups: list[Group], refused: dict[str, str]) -> tuple[list[Group], dict[str, str]]:
    faults = prober.faults(groups)
    return [group for group in groups if group.name not in faults], refused | faults


def _evenly(
    prober: Prober, found: list[Group], refused: dict[str, str], failed: set[str], projections: set[str]
) -> tuple[list[Group], dict[str, str]]:
    """What could not go channel by channel may go in the same places of every part that code folds its axis into."""
    taken = {key: set(where.flatten().tolist()) for group in found for key, where in group.members.items()}
    groups, _ = traced_groups(prober.model, prober.inputs, projections, even=True)
    again = [
        group
        for group in groups
        if group.name.partition("#")[0] in failed
        and not any(taken.get(key, set()) & set(where.flatten().tolist()) for key, where in group.members.items())
    ]
    faults = prober.faults(again)
    more = [group for group in again if group.name not in faults]
    cut = {group.name.partition("#")[0] for group in more}
    return found + more, {name: why for name, why in refused.items() if name not in cut}


def channel_groups(model: nn.Module, example_inputs: Inputs) -> Groups:
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
