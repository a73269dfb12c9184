"""Which slices of which parameters leave together with a channel: read from one run of the model (``trace``)."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from prunekit.batch import Inputs
from prunekit.errors import StructureError, quoted
from prunekit.structure.cut import Prober
from prunekit.structure.families import experts_of
from prunekit.structure.groups import Group, Groups, tied_names
from prunekit.structure.labels import united_along
from prunekit.structure.roles import weight_roles
from prunekit.structure.structure import Mappings, Structure, checked
from prunekit.structure.trace import SILENT, TookTooLong, Trace
from prunekit.structure.units.heads import attention_groups, attention_units
from prunekit.structure.units.neurons import neuron_groups

SECONDS = 120.0
"""After so long a model's reading is given up; attention and MLPs known by their names go on."""


def channel_units(prober: Prober, attention: Mappings) -> Groups:
    """Channels and neurons with all that depends on them, and the heads of known attention; all were cut once."""
    heads, refused, projections, others = attention_groups(prober.model, attention)
    projections |= {router for _, _, router, _ in experts_of(prober.model, attention)}
    traced: list[Group] = []
    try:
        traced, left_out = traced_groups(prober.model, prober.inputs, projections)
        refused = left_out | refused
    except StructureError as error:
        refused = {"channels": str(error).removeprefix("channels: "), **refused}
    found, refused = checked(prober, traced, refused)  # apart: a replaced module may allow what the given one does not
    if failed := {group.name.partition("#")[0] for group in traced} & refused.keys():
        found, refused = _evenly(prober, found, refused, failed, projections)
    found, refused = _with_named(prober, found, refused, attention)
    whole, refused = attention_units(prober, heads, others, refused)
    return Groups(found + whole, refused)


def _with_named(
    prober: Prober, found: list[Group], refused: dict[str, str], attention: Mappings
) -> tuple[list[Group], dict[str, str]]:
    """Neurons of MLPs and experts too that are known by their names, where they were not read."""
    taken = {key for group in found for key in group.members}
    named = [group for group in neuron_groups(prober.model, attention)[0] if not taken & group.members.keys()]
    faults = prober.faults(named)
    more = [group for group in named if group.name not in faults]
    return found + more, {name: why for name, why in refused.items() if name not in {group.name for group in more}}


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


STRUCTURE = Structure(
    channel_units,
    "channels and neurons with all that depends on them, and the heads of known attention",
    nothing="the model has no channels that can be removed (only its output layer has any)",
    sized=True,
    part="channel",
    holds=("heads", "neurons", "experts"),
)


def traced_groups(
    model: nn.Module, inputs: Inputs, skip: Collection[str] = (), seconds: float | None = SECONDS, even: bool = False
) -> tuple[list[Group], dict[str, str]]:
    """Groups of channels as the model's operations have them, not yet checked by running, and what was refused, with reasons.

    Args:
        model: in evaluation mode, with its inputs on one device; left as it is.
        inputs: a batch of one or two samples.
        skip: names of layers whose outputs are no channels (an attention's projections).
        seconds: how long reading may take; None for no limit.
        even: where code folds an axis into several, what is at the same place of each part leaves together.

    Raises:
        StructureError: the model cannot be read.
    """
    trace = Trace(model, skip, None if seconds is None else time.monotonic() + seconds)
    try:
        trace.read(inputs)
    except TookTooLong:
        raise StructureError(f"channels: the model's operations were not read within {seconds:g} s") from None
    except Exception as error:  # the user's own model meets a mode that it may not expect
        raise StructureError(f"channels: the model cannot be read ({quoted(error, 120)})") from error
    for labels in trace.splits if even else ():
        for axis in range(labels.dim()):
            if labels.stride(axis) and labels.shape[axis] > 1:
                united_along(trace.slots, labels, [axis], "")
                break
    return _groups(model, trace)


Unit = dict[str, list[int]]
"""``<tensor>@<axis>`` or ``<module>:<attribute>`` -> indices."""


def _groups(model: nn.Module, trace: Trace) -> tuple[list[Group], dict[str, str]]:
    producers = _producers(model)
    alike: dict[tuple[tuple[str, int], ...], list[Unit]] = {}
    refused: dict[str, str] = {}
    latest = {name: trace.order[key.rsplit("@", 1)[0]] for key, name in producers.items() if key.rsplit("@", 1)[0] in trace.order}
    for unit, reason in trace.slots.units():
        made_by = {producers[key] for key in unit if key in producers}
        if not made_by or any("@" in key and key.rsplit("@", 1)[0] not in trace.order for key in unit):
            continue  # nothing of a layer's outputs, or of a layer that the model does not run
        if reason is None:
            alike.setdefault(tuple((key, len(places)) for key, places in sorted(unit.items())), []).append(unit)
        elif reason != SILENT:
            refused.setdefault(max(made_by, key=latest.__getitem__), reason)
    named: dict[str, list[list[Unit]]] = {}
    for units in alike.values():
        made_by = {producers[key] for key in units[0] if key in producers}
        named.setdefault(max(made_by, key=latest.__getitem__), []).append(units)
    found = []
    for root in sorted(named, key=lambda name: -latest[name]):
        for number, units in enumerate(named[root]):
            name = f"{root}#{number + 1}" if len(named[root]) > 1 else root
            found.append(_group(name, root, units, trace.order))
    for name, other in tied_names(model).items():
        layer = name.rpartition(".")[0]
        if layer in producers.values():
            refused.setdefault(layer, f"{name} is tied to {other}; surgery would untie them")
    whole = {name for units in alike.values() for key in units[0] if (name := producers.get(key, ""))}
    return found, {name: reason for name, reason in refused.items() if name not in whole}


def _producers(model: nn.Module) -> dict[str, str]:
    """``<weight>@<axis of its outputs>`` -> its layer."""
    found = {}
    for name, role in weight_roles(model).items():
        layer = name.rpartition(".")[0].partition(".parametrizations.")[0]
        axis = 1 if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding | nn.EmbeddingBag) else role.output
        found[f"{name}@{axis}"] = layer
    return found


def _group(name: str, root: str, units: list[Unit], order: dict[str, int]) -> Group:
    def place(key: str) -> Any:
        tensor = key.rsplit("@", 1)[0]
        return tensor.rpartition(".")[0] != root, order[tensor]

    units = sorted(units, key=lambda unit: min(places for key, places in unit.items() if key.startswith(f"{root}.")))
    members = {
        key: torch.tensor([sorted(unit[key]) for unit in units]) for key in sorted((k for k in units[0] if "@" in k), key=place)
    }
    return Group(name, members, {key: len(places) for key, places in units[0].items() if "@" not in key})
