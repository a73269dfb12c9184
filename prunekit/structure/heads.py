"""Attention heads: which rows and columns of the projections belong to each, found by name or said by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError
from prunekit.structure.groups import Group, tied_names
from prunekit.structure.replacements import NarrowAttention

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
)  # fmt: skip
FUSED = ("qkv", "qkv_proj", "in_proj", "c_attn", "query_key_value", "Wqkv")
OUTPUTS = ("o_proj", "out_proj", "o", "out", "wo", "proj", "to_out", "to_out.0", "out_lin", "dense", "c_proj")
HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads")
KV_HEADS = ("kv_heads", "num_kv_heads", "n_kv_heads", "num_key_value_heads")
WIDTHS = ("all_head_size", "inner_dim", "inner_width", "inner_size")
Mappings = Sequence[Mapping[str, Any]]
"""``[{q: <layer>, k: …, v: …, o: …, heads: 4, kv_heads: 2}]``: attention that its names do not give away.

``{qkv: <layer>, o: …, heads: 4}``: one layer whose outputs are all queries, then all keys, then all values.
"""


def attention_groups(model: nn.Module, given: Mappings = ()) -> tuple[list[Group], dict[str, str], set[str]]:
    """Groups of heads, not yet checked by running; what was refused, with reasons; names of the projections.

    A unit is a key-value head with all the query heads that look at it: one with plain attention, several with grouped
    queries. Known are ``nn.MultiheadAttention`` and modules with three linear layers of names in ``PROJECTIONS`` (or one in
    ``FUSED``), one in ``OUTPUTS`` and an integer attribute in ``HEADS``.

    Raises:
        UsageError: a given mapping names a layer that does not exist, or is none that it can be.
    """
    found: list[Group] = []
    refused: dict[str, str] = {}
    layers: set[str] = set()
    tied = tied_names(model)
    specs = [_checked(model, mapping) for mapping in given]
    mapped = {_first(spec) for spec in specs}
    for name, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, NarrowAttention)):
            reason = _packed_reason(module)
            if reason is not None:
                refused[name] = reason
            else:
                found.append(_packed(name, module))
        elif (spec := _by_name(name, module)) is not None and _first(spec) not in mapped:
            specs.append(spec)
    for spec in specs:
        layers |= {spec[key] for key in ("q", "k", "v", "qkv") if spec.get(key)}
        name = _first(spec).rpartition(".")[0] or _first(spec)
        try:
            found.append(_fused(name, model, spec) if spec.get("qkv") else _separate(name, model, spec))
        except ValueError as error:
            refused[name] = str(error)
    for group in list(found):
        bound = next((m.rsplit("@", 1)[0] for m in group.members if m.rsplit("@", 1)[0] in tied), None)
        if bound is not None:
            found.remove(group)
            refused[group.name] = f"{bound} is tied to {tied[bound]}; surgery would untie them"
    return found, refused, layers


def _first(spec: Mapping[str, Any]) -> str:
    return str(spec.get("qkv") or spec.get("q"))


def _checked(model: nn.Module, mapping: Mapping[str, Any]) -> dict[str, Any]:
    modules = dict(model.named_modules())
    for key in ("qkv", "o") if mapping.get("qkv") else ("q", "k", "v", "o"):
        name = mapping.get(key)
        if not isinstance(modules.get(str(name)), nn.Linear):
            raise UsageError(f"structure.attention: {key} is {name!r}, which is no linear layer of the model")
    parent = modules[_first(mapping).rpartition(".")[0]]
    heads = mapping.get("heads") or _attribute(parent, HEADS)[1]
    if heads is None:
        raise UsageError(f"structure.attention: heads of {_first(mapping)} is not given, and no attribute says it")
    return {**mapping, "heads": heads, "kv_heads": mapping.get("kv_heads") or _attribute(parent, KV_HEADS)[1]}


def _by_name(name: str, module: nn.Module) -> dict[str, Any] | None:
    heads = _attribute(module, HEADS)[1]
    if heads is None:
        return None
    linear = {n for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    inputs = next((names for names in PROJECTIONS if linear.issuperset(names)), None)
    output = next((o for o in OUTPUTS if o in linear), None)
    fused = next((f for f in FUSED if f in linear), None)
    prefix = f"{name}." if name else ""
    if output is None or (inputs is None and fused is None):
        return None
    if inputs is None:
        return {"qkv": f"{prefix}{fused}", "o": prefix + output, "heads": heads}
    spec: dict[str, Any] = {key: prefix + layer for key, layer in zip("qkvo", (*inputs, output), strict=True)}
    return {**spec, "heads": heads, "kv_heads": _attribute(module, KV_HEADS)[1]}


def _attribute(module: nn.Module, names: Sequence[str]) -> tuple[str | None, int | None]:
    for name in names:
        value = module.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return name, value
    return None, None


def _separate(name: str, model: nn.Module, spec: Mapping[str, Any]) -> Group:
    """Raises ValueError when the sizes are not those of so many heads."""
    q, k, v, o = (_linear(model, spec[key]) for key in "qkvo")
    heads = int(spec["heads"])
    if q.out_features % heads:
        raise ValueError(f"{spec['q']} has {q.out_features} outputs, not a multiple of {heads} heads")
    size = q.out_features // heads
    units = int(spec["kv_heads"] or k.out_features // size)
    if units < 1 or heads % units or k.out_features != units * size or v.out_features % units:
        raise ValueError(f"{spec['k']} and {spec['v']} do not have the outputs of {units} key-value heads of {size}")
    value = v.out_features // units
    share = heads // units
    if o.in_features != heads * value:
        raise ValueError(f"{spec['o']} has {o.in_features} inputs, not those of {heads} heads of {value}")
    members: dict[str, Tensor] = {}
    for layer, block in ((spec["q"], share * size), (spec["k"], size), (spec["v"], value)):
        members |= _rows(model, layer, units, block)
    members[f"{spec['o']}.weight@1"] = torch.arange(o.in_features).view(units, share * value)
    counted = ((HEADS, heads, share), (KV_HEADS, units, 1), (WIDTHS, heads * size, share * size))
    return Group(name, members, _counting(model, spec["q"], counted))


def _fused(name: str, model: nn.Module, spec: Mapping[str, Any]) -> Group:
    """Raises ValueError when the sizes are not those of so many heads."""
    qkv, o, heads = _linear(model, spec["qkv"]), _linear(model, spec["o"]), int(spec["heads"])
    if qkv.out_features != 3 * o.in_features or o.in_features % heads:
        raise ValueError(f"{spec['qkv']} has {qkv.out_features} outputs, not three times those of {heads} heads")
    size = o.in_features // heads
    rows = torch.arange(heads * size).view(heads, size)
    three = _three(rows)
    members = {f"{spec['qkv']}.weight@0": three, f"{spec['o']}.weight@1": rows}
    if qkv.bias is not None:
        members[f"{spec['qkv']}.bias@0"] = three.clone()
    return Group(name, members, _counting(model, spec["qkv"], ((HEADS, heads, 1), (WIDTHS, heads * size, size))))


def _three(rows: Tensor) -> Tensor:
    """Rows of query, key and value that lie below each other in one matrix."""
    return torch.cat([rows, rows + rows.numel(), rows + 2 * rows.numel()], 1)


def _counting(model: nn.Module, layer: str, counted: Sequence[tuple[Sequence[str], int, int]]) -> dict[str, int]:
    """Attributes, beside ``layer``, of known names that have the expected value, and by how much a unit lowers them."""
    holder = layer.rpartition(".")[0]
    module = model.get_submodule(holder)
    return {
        f"{holder}:{attribute}": each
        for names, now, each in counted
        for attribute in names
        if _attribute(module, [attribute])[1] == now
    }


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _rows(model: nn.Module, layer: str, units: int, block: int) -> dict[str, Tensor]:
    rows = torch.arange(units * block).view(units, block)
    bias = getattr(model.get_submodule(layer), "bias", None)
    return {f"{layer}.weight@0": rows} | ({f"{layer}.bias@0": rows.clone()} if bias is not None else {})


def _packed_reason(module: nn.MultiheadAttention | NarrowAttention) -> str | None:
    if getattr(module, "bias_k", None) is not None or getattr(module, "add_zero_attn", False):
        return "is a MultiheadAttention with add_bias_kv or add_zero_attn, which is not handled"
    return None


def _packed(name: str, module: nn.MultiheadAttention | NarrowAttention) -> Group:
    heads, size = module.num_heads, module.head_dim
    rows = torch.arange(heads * size).view(heads, size)
    three = _three(rows)
    prefix = f"{name}." if name else ""
    if module.in_proj_weight is not None:
        members = {f"{prefix}in_proj_weight@0": three}
    else:
        members = {f"{prefix}{key}_proj_weight@0": rows.clone() for key in "qkv"}
    if module.in_proj_bias is not None:
        members[f"{prefix}in_proj_bias@0"] = three.clone()
    members[f"{prefix}out_proj.weight@1"] = rows.clone()
    return Group(name, members, {f"{name}:num_heads": 1}, {name: "attention"})
