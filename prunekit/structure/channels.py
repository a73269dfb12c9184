"""Which slices of which parameters leave together with a channel: torch-pruning's dependency graph, read into tensors."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import StructureError
from prunekit.structure.cut import CONVOLUTIONS, TRANSPOSED
from prunekit.structure.groups import Group, tied_names
from prunekit.trajectory.copies import copied

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
Blocks = dict[int, list[int]]
"""Root channel -> the indices on some axis that come from it."""


class _Refused(Exception):
    """This group cannot be cut; says why."""


@dataclass
class _Draft:
    """A group while it is read.

    Attributes:
        members: ``<param>@<axis>`` -> indices by root channel.
        together: lists of root channels that can only leave together.
        counted: ``<module>:<attribute>`` -> what it counts, by root channel (indices of the things counted).
    """

    members: dict[str, Blocks] = field(default_factory=dict)
    together: list[list[int]] = field(default_factory=list)
    counted: dict[str, Blocks] = field(default_factory=dict)


def build_graph(model: nn.Module, example_inputs: Tensor) -> Any:
    """torch-pruning's dependency graph of ``model``.

    Raises:
        StructureError: the model cannot be traced.
    """
    import torch_pruning as tp  # only whoever traces needs it: cutting and loading a pruned model do not

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tp.DependencyGraph().build_dependency(model, example_inputs, verbose=False)
        except Exception as error:  # a tracer meets any model: whatever it raises means that it cannot take this one
            raise StructureError(
                f"channels: the model's dependency graph cannot be traced ({type(error).__name__}: {error})"
            ) from error


def traced_groups(model: nn.Module, example_inputs: Tensor, skip: Collection[str] = ()) -> tuple[list[Group], dict[str, str]]:
    """Groups of channels as the graph has them, not yet checked by running, and what was refused, with reasons.

    Args:
        model: left as it is.
        example_inputs: a batch of one or two samples, for tracing.
        skip: names of layers whose outputs are no channels (an attention's projections).

    Raises:
        StructureError: the model cannot be traced.
    """
    model = copied(model).cpu().requires_grad_(True)  # frozen weights would hide layers from the tracer
    graph = build_graph(model, example_inputs.cpu())
    names = {module: name for name, module in model.named_modules()}
    tied = tied_names(model)
    found: list[Group] = []
    refused: dict[str, str] = {}
    taken: dict[str, Tensor] = {}
    for group in graph.get_all_groups():
        root = names[group[0].dep.target.module]
        if root in skip or any(not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler) for dep, _ in group):
            continue  # nothing follows this node: its channels are the model's outputs
        try:
            draft = _Draft()
            for item in group:
                _read(graph, item, names, tied, draft)
            for part in _parts(root, len(group[0].idxs), draft):
                _claim(part, taken)
                found.append(part)
        except _Refused as reason:
            refused[root] = str(reason)
    return found, refused


def _claim(group: Group, taken: dict[str, Tensor]) -> None:
    """An index may leave with one unit only: a graph that says otherwise was misread."""
    for member, index in group.members.items():
        if member in taken and torch.isin(index, taken[member]).any():
            raise _Refused(f"{member} would be cut by two groups")
    for member, index in group.members.items():
        taken[member] = torch.cat([taken.get(member, index.new_empty(0)), index.flatten()])


def _read(graph: Any, item: Any, names: dict[nn.Module, str], tied: dict[str, str], draft: _Draft) -> None:
    """Adds what one item of a torch-pruning group holds to the draft."""
    module, handler = item.dep.target.module, item.dep.handler
    if isinstance(module, nn.Parameter):
        raise _Refused(f"{graph._param_to_name[module]} is a parameter outside a known layer; its axes are not known")
    if module not in names:
        return  # reshape, concatenation, addition: they hold nothing
    name, outwards = names[module], graph.is_out_channel_pruning_fn(handler)
    blocks: Blocks = {}
    for index, origin in zip(item.idxs, item.root_idxs, strict=True):
        blocks.setdefault(origin, []).append(index)
    found = _layer(module, name, outwards, blocks, draft)
    prefix = f"{name}." if name else ""
    for key, where in found.items():
        short = key.split("@")[0]
        if getattr(module, short, None) is None:
            continue
        if prefix + short in tied:
            raise _Refused(f"{prefix + short} is tied to {tied[prefix + short]}; surgery would untie them")
        draft.members[prefix + key] = where


def _layer(module: nn.Module, name: str, outwards: bool, blocks: Blocks, draft: _Draft) -> dict[str, Blocks]:
    """``<tensor>@<axis>`` -> indices of one layer; what has to leave together and what is counted goes to the draft."""
    per_channel = {f"{key}@0": blocks for key in ("weight", "bias", "running_mean", "running_var")}
    if isinstance(module, nn.LayerNorm):
        raise _Refused(f"{name} is a LayerNorm; removing channels would change the statistics it divides by")
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        draft.counted[f"{name}:num_features"] = blocks
        return per_channel
    if isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        classes = _classes(blocks, lambda i: i // size)
        _whole(classes, size, f"{name} is a GroupNorm of {module.num_groups} groups of {size} channels")
        draft.together += [origins for origins, _ in classes.values()]
        draft.counted[f"{name}:num_channels"] = blocks
        draft.counted[f"{name}:num_groups"] = {origins[0]: [c] for c, (origins, _) in classes.items()}
        return per_channel
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return _grouped(module, name, outwards, blocks, draft)
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return {"weight@0": blocks, "bias@0": blocks} if outwards else {"weight@1": blocks}
    if isinstance(module, TRANSPOSED) and module.groups == 1:
        return {"weight@1": blocks, "bias@0": blocks} if outwards else {"weight@0": blocks}
    if isinstance(module, nn.Embedding):
        return {"weight@1": blocks}
    if isinstance(module, nn.PReLU):
        if module.num_parameters == 1:
            return {}
        draft.counted[f"{name}:num_parameters"] = blocks
        return per_channel
    raise _Refused(f"{name} is a {type(module).__name__}, a layer type that is not handled")


def _grouped(module: Any, name: str, outwards: bool, blocks: Blocks, draft: _Draft) -> dict[str, Blocks]:
    """A grouped convolution loses as many channels in each of its groups; a depthwise one loses groups."""
    inside, outside, groups = module.in_channels // module.groups, module.out_channels // module.groups, module.groups
    if inside == outside == 1:
        draft.counted[f"{name}:groups"] = blocks
        return {"weight@0": blocks, "bias@0": blocks}
    size = outside if outwards else inside
    classes = _classes(blocks, lambda i: i % size)
    _whole(classes, groups, f"{name} is a grouped convolution (groups={groups}, {size} {'out' if outwards else 'in'}puts each)")
    draft.together += [origins for origins, _ in classes.values()]
    if outwards:
        return {"weight@0": blocks, "bias@0": blocks}
    # Its second axis holds one group's inputs: the place that leaves is the same in each of them.
    return {"weight@1": {origins[0]: [place] for place, (origins, _) in classes.items()}}


def _classes(blocks: Blocks, of: Any) -> dict[int, tuple[list[int], list[int]]]:
    """Class -> its root channels and its indices."""
    classes: dict[int, tuple[list[int], list[int]]] = {}
    for origin, indices in blocks.items():
        for index in indices:
            origins, members = classes.setdefault(of(index), ([], []))
            origins.append(origin)
            members.append(index)
    return classes


def _whole(classes: dict[int, tuple[list[int], list[int]]], size: int, what: str) -> None:
    if any(len(indices) != size for _, indices in classes.values()):
        raise _Refused(f"{what}, of which only whole groups can go; some of their channels come from elsewhere")


def _parts(name: str, channels: int, draft: _Draft) -> list[Group]:
    """Groups of units that are alike: as many indices on every axis, as much counted.

    Branches joined to a part of a layer's channels make units that differ; those come as groups of their own,
    ``name#1``, ``name#2`` and so on.
    """
    parent = list(range(channels))

    def find(c: int) -> int:
        while parent[c] != c:
            parent[c] = parent[parent[c]]
            c = parent[c]
        return c

    for origins in draft.together:
        for other in origins[1:]:
            a, b = find(origins[0]), find(other)
            parent[max(a, b)] = min(a, b)
    units: dict[int, list[int]] = {}
    for channel in range(channels):
        units.setdefault(find(channel), []).append(channel)
    alike: dict[tuple[int, ...], list[list[int]]] = {}
    tables = [*draft.members.values(), *draft.counted.values()]
    for unit in units.values():
        alike.setdefault(tuple(sum(len(table.get(c, ())) for c in unit) for table in tables), []).append(unit)
    groups = []
    for number, (sizes, members) in enumerate(alike.items()):
        tensors = {
            key: torch.tensor([sorted(i for c in unit for i in table.get(c, ())) for unit in members])
            for key, table in draft.members.items()
            if any(table.get(c) for c in members[0])
        }
        counts = dict(zip(draft.counted, sizes[len(draft.members) :], strict=True))
        counts = {key: count for key, count in counts.items() if count}
        groups.append(Group(f"{name}#{number + 1}" if len(alike) > 1 else name, tensors, counts))
    return groups
