"""Which slices of which parameters leave together with a channel: torch-pruning's dependency graph, read into tensors."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import StructureError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CHANNEL_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ChannelGroup:
    """The channels of one layer and everything that goes with each.

    Attributes:
        name: of the layer whose outputs they are, such as ``conv2``.
        members: ``<parameter or buffer>@<axis>`` -> ``(channels, block)``, the indices on that axis of each channel;
            the block is more than 1 behind a flattening.
    """

    name: str
    members: dict[str, Tensor]

    @property
    def size(self) -> int:
        return len(next(iter(self.members.values())))


def build_graph(model: nn.Module, example_inputs: Tensor) -> Any:
    """torch-pruning's dependency graph of ``model``.

    Raises:
        StructureError: the model cannot be traced.
    """
    import torch_pruning as tp  # only whoever traces needs it: loading a pruned model does not

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tp.DependencyGraph().build_dependency(model, example_inputs, verbose=False)
        except Exception as error:  # a tracer meets any model: whatever it raises means that it cannot take this one
            raise StructureError(
                f"channels: the model's dependency graph cannot be traced ({type(error).__name__}: {error})"
            ) from error


def channel_groups(model: nn.Module, example_inputs: Tensor) -> list[ChannelGroup]:
    """All groups of channels that can be removed from ``model`` without changing its outputs' shape.

    Args:
        model: left as it is.
        example_inputs: a batch of one or two samples, for tracing.

    Raises:
        StructureError: the model has no such group, or a layer in one is not handled; names the layer.
    """
    model = copy.deepcopy(model).cpu().requires_grad_(True)  # frozen weights would hide layers from the tracer
    _refuse_tied(model)
    graph = build_graph(model, example_inputs.cpu())
    names = {module: name for name, module in model.named_modules()}
    groups = []
    for group in graph.get_all_groups():
        if any(not dep.target.outputs and graph.is_out_channel_pruning_fn(dep.handler) for dep, _ in group):
            continue  # nothing follows this node: its channels are the model's outputs
        members: dict[str, Tensor] = {}
        for item in group:
            members.update(_members(graph, item, names))
        groups.append(ChannelGroup(names[group[0].dep.target.module], members))
    if not groups:
        raise StructureError("channels: the model has no channels that can be removed (only its output layer has any)")
    return groups


def _refuse_tied(model: nn.Module) -> None:
    found: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in found:
            raise StructureError(f"channels: {name} is tied to {found[id(parameter)]}; surgery would untie them")
        found[id(parameter)] = name


def _members(graph: Any, item: Any, names: dict[nn.Module, str]) -> dict[str, Tensor]:
    """``<param>@<axis>`` -> indices, of one item of a torch-pruning group."""
    module, handler = item.dep.target.module, item.dep.handler
    if isinstance(module, nn.Parameter):
        raise StructureError(
            f"channels: {graph._param_to_name[module]} is a parameter outside a known layer; its axes are not known"
        )
    if module not in names:
        return {}  # reshape, concatenation, addition: they hold nothing
    name, outwards = names[module], graph.is_out_channel_pruning_fn(handler)
    if isinstance(module, CHANNEL_NORMS):
        raise StructureError(
            f"channels: {name} is a {type(module).__name__}; removing channels would change the statistics it divides by"
        )
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        raise StructureError(f"channels: {name} is a grouped convolution (groups={module.groups}), not handled yet")
    if isinstance(module, BATCH_NORMS):
        keys = [f"{key}@0" for key in ("weight", "bias", "running_mean", "running_var")]
    elif isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        keys = ["weight@0", "bias@0"] if outwards else ["weight@1"]
    else:
        raise StructureError(f"channels: {name} is a {type(module).__name__}, a layer type that is not handled")
    index = _by_channel(item.idxs, item.root_idxs, name)
    prefix = f"{name}." if name else ""
    return {f"{prefix}{key}": index.clone() for key in keys if getattr(module, key.split("@")[0]) is not None}


def _by_channel(indices: list[int], roots: list[int], name: str) -> Tensor:
    channels: dict[int, list[int]] = {}
    for index, root in zip(indices, roots, strict=True):
        channels.setdefault(root, []).append(index)
    blocks = {len(block) for block in channels.values()}
    if sorted(channels) != list(range(len(channels))) or len(blocks) != 1:
        raise StructureError(f"channels: the inputs of {name} do not come in equal blocks per channel")
    return torch.tensor([channels[root] for root in sorted(channels)])
