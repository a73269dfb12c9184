"""The config of transformers that says a pruned model's shapes, where there is one.

Which number of a config changes what is not looked up but tried: the class is built on the meta device with that number lowered
by one unit, and the tensors that become smaller tell how many units the pruned model lacks. A config counts only where its model
then has every tensor of the pruned one, in its shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunekit.structure.replacements import Skip

DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
"""Numbers of blocks."""
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
KV_HEADS = "num_key_value_heads"
HEAD_DIM = "head_dim"
"""The size of a head, which many models read though their config leaves it out."""
WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size",
    "moe_intermediate_size", "shared_expert_intermediate_size", "num_local_experts", "num_experts", "n_routed_experts",
)  # fmt: skip
"""Numbers of neurons in a block, and of experts."""
FOUR_TIMES = {"n_inner": "n_embd"}
"""Widths that are None for four times another number."""
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def saying(model: Any) -> tuple[Any, str]:
    """The config whose model has the shapes of ``model``, whose removed blocks are left out; else None and the reason.

    Args:
        model: a pruned model of transformers, with the dense model's config.
    """
    config = copy.deepcopy(model.config)
    _fewer_blocks(model, config)
    with without_skipped(model):
        wanted = shapes_of(model)
    for part in parts_of(config):
        before = dict(vars(part))
        _spell_out(part)
        for lowered in _changes(part):
            _lower(type(model), config, part, lowered, wanted)
        if HEAD_DIM not in before and all(vars(part).get(name) == before.get(name) for name in HEADS):
            vars(part).pop(HEAD_DIM, None)  # nothing depends on what the config did not say before
    found = _built(type(model), config)
    if found is None:
        return None, "transformers refuses a config with its numbers of heads and neurons"
    if (fault := _difference(wanted, found)) is None:
        return config, ""
    return None, fault


@contextmanager
def without_skipped(model: nn.Module) -> Iterator[None]:
    """While inside, removed blocks have left the lists that they stood in, and those behind them have moved up."""
    kept = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(isinstance(block, Skip) for block in module):
            kept.append((module, dict(module._modules)))
    try:
        for module, blocks in kept:
            left = [block for block in blocks.values() if not isinstance(block, Skip)]
            module._modules.clear()
            module._modules.update({str(index): block for index, block in enumerate(left)})
        yield
    finally:
        for module, blocks in kept:
            module._modules.clear()
            module._modules.update(blocks)


def _fewer_blocks(model: nn.Module, config: Any) -> None:
    """Lowers the numbers of blocks; what a config says block by block loses the same ones."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for blocks in lists:
        gone = [index for index, block in enumerate(blocks) if isinstance(block, Skip)]
        if not gone:
            continue
        for part in parts_of(config):
            own = [name for name in DEPTHS if vars(part).get(name) == len(blocks)]
            if not own:
                continue
            for name, value in list(vars(part).items()):
                if isinstance(value, list) and len(value) == len(blocks) and ("layer" in name or "block" in name):
                    setattr(part, name, [each for index, each in enumerate(value) if index not in gone])
            decoder = "decoder" in _place(model, blocks)
            for name in [each for each in own if ("decoder" in each) == decoder] or own:
                setattr(part, name, len(blocks) - len(gone))
            break


def _place(model: nn.Module, module: nn.Module) -> str:
    return str(next(name for name, each in model.named_modules() if each is module))


def parts_of(config: Any) -> list[Any]:
    """The config and the configs in it (of a text and a vision model)."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *inner]


def _spell_out(part: Any) -> None:
    """Numbers that a config leaves to others become its own, so that they stay when the others change."""
    for name, other in FOUR_TIMES.items():
        if name in vars(part) and getattr(part, name) is None:
            setattr(part, name, 4 * getattr(part, other))
    heads = next((vars(part)[name] for name in HEADS if isinstance(vars(part).get(name), int)), 0)
    if heads and vars(part).get(HEAD_DIM) is None and isinstance(vars(part).get("hidden_size"), int):
        part.head_dim = part.hidden_size // heads


def _changes(part: Any) -> Iterator[dict[str, int]]:
    """What goes together: name of a number -> how much of it is one unit."""
    found = vars(part)
    for name in HEADS:
        if isinstance(found.get(name), int):
            groups = found.get(KV_HEADS)
            if isinstance(groups, int) and groups and found[name] % groups == 0:
                yield {name: found[name] // groups, KV_HEADS: 1}
            else:
                yield {name: 1}
    for name in WIDTHS:
        if isinstance(found.get(name), int) and found[name] > 1:
            yield {name: 1}


def _lower(kind: type, config: Any, part: Any, change: Mapping[str, int], wanted: Shapes) -> None:
    """Lowers some numbers of a config, if tensors that they decide on are smaller in the pruned model."""
    old = {name: vars(part)[name] for name in change}
    before = _built(kind, config)
    after = None
    units = 1
    while before is not None and after is None and units < min(old[name] // amount for name, amount in change.items()):
        _set(part, {name: old[name] - units * amount for name, amount in change.items()})
        after = _built(kind, config)
        units *= 2  # a config may refuse some numbers of heads
    _set(part, old)
    if before is None or after is None:
        return
    step = units // 2
    for name, shape in before.items():
        if name not in wanted or name not in after or len(wanted[name]) != len(shape):
            continue
        for size, fewer, pruned in zip(shape, after[name], wanted[name], strict=True):
            if size > fewer and size != pruned:
                gone = (size - pruned) * step // (size - fewer)
                _set(part, {key: old[key] - gone * amount for key, amount in change.items()})
                return


def _set(part: Any, values: Mapping[str, int]) -> None:
    for name, value in values.items():
        setattr(part, name, value)


def _built(kind: type, config: Any) -> Shapes | None:
    """Shapes of the class with a config; None where transformers refuses it."""
    try:
        with torch.device("meta"):
            return shapes_of(kind(type(config).from_dict(config.to_dict())))
    except Exception:  # transformers' checks of a config raise what they like, and an impossible shape is torch's to refuse
        return None


def _difference(wanted: Shapes, found: Shapes) -> str | None:
    """The first tensor in which a config's model is another, in words."""
    for name in [*wanted, *found]:
        if name not in wanted:
            return f"{name} is gone alone, and a config leaves out whole blocks"
        if name not in found:
            return f"{name} is in no model of its config"
        if wanted[name] != found[name]:
            return f"{name} is {wanted[name]}, a config with the same numbers in every layer gives {found[name]}"
    return None
