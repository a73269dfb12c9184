"""Channels taken out for real: torch-pruning cuts the tensors, and the result is checked against the masked model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from prunekit.apply.masks import apply_masks
from prunekit.errors import StructureError
from prunekit.plan import Plan
from prunekit.structure.channels import build_graph


def cut_channels(model: nn.Module, plan: Plan, example_inputs: Tensor) -> nn.Module:
    """A smaller copy of ``model`` without the channels that ``plan`` removes; training mode and grad flags are kept.

    Raises:
        StructureError: the small model's outputs are not the masked dense model's (a layer that the graph misread).
    """
    example_inputs = example_inputs.cpu()
    small = copy.deepcopy(model).cpu()
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    small.requires_grad_(True).eval()
    graph = build_graph(small, example_inputs)
    modules = dict(small.named_modules())
    for name, keep in plan.keep.items():
        gone = (~keep).nonzero().flatten().tolist()
        if gone:
            module = modules[name]
            pruner = graph.get_pruner_of_module(module)
            graph.get_pruning_group(module, pruner.prune_out_channels, gone).prune(record_history=False)
    for name, parameter in small.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name not in frozen)
    _same_as_masked(small, model, plan, example_inputs)
    return small.train(model.training)


@torch.no_grad()
def _same_as_masked(small: nn.Module, model: nn.Module, plan: Plan, example_inputs: Tensor) -> None:
    masked = copy.deepcopy(model).cpu().eval()
    apply_masks(masked, plan.masks())
    try:
        got, expected = small(example_inputs), masked(example_inputs)
    except RuntimeError as error:
        raise StructureError(f"channels: the pruned model does not run ({error}); its structure is not handled") from None
    off = float((got - expected).abs().max())
    if off > 1e-4 * (1 + float(expected.abs().max())):
        raise StructureError(
            f"channels: the pruned model's outputs differ from the masked model's by {off:.3g}: something in it counts "
            "its channels (a mean or a norm over them), so removing some changes what the others compute"
        )
