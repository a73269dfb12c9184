"""Attention heads: which rows and columns of the projections belong to each, found by name or said by the user."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError, theirs
from prunekit.imports import load_object
from prunekit.structure.cut import Prober
from prunekit.structure.families import FAMILY, Family, rows
from prunekit.structure.groups import Group, Groups, tied_names
from prunekit.structure.replacements import NarrowAttention
from prunekit.structure.structure import Mappings, Structure, checked

HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads")
KV_HEADS = ("kv_heads", "num_kv_heads", "n_kv_heads", "num_key_value_heads")
BIAS = "relative_attention_bias"
"""Of T5: an embedding with a number a head, in the first block of a stack, which the attention of all its blocks adds."""
WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "inner_width", "inner_size", "split_size")


def head_units(prober: Prober, attention: Mappings) -> Groups:
    """Attention heads; with grouped queries a key-value head with all its query heads. All were cut once."""
    heads, refused, _, others = attention_groups(prober.model, attention)
    return Groups(*attention_units(prober, heads, others, refused))


STRUCTURE = Structure(
    head_units,
    "attention heads; with grouped queries a key-value head with all its query heads",
    nothing="no attention was found (nn.MultiheadAttention, or q/k/v/o projections beside a number of heads); "
    "name it in the recipe's structure.attention",
    sized=True,
    counted=True,
    part="head",
)


def attention_units(
    prober: Prober, heads: list[Group], others: list[Group], refused: dict[str, str]
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be cut, other readings taken where the first cannot; the rest with reasons."""
    whole, refused = checked(prober, heads, refused)
    more, _ = checked(prober, [group for group in others if group.name in refused], {})
    return whole + more, {name: why for name, why in refused.items() if name not in {group.name for group in more}}


def attention_groups(model: nn.Module, given: Mappings = ()) -> tuple[list[Group], dict[str, str], set[str], list[Group]]:
    """Groups of heads, not yet checked by running; what was refused, with reasons; names of the projections; other readings.

    Another reading of a group has its name: one layer for queries, keys and values holds them head by head, not one after
    the other.

    A unit is a key-value head with all the query heads that look at it: one with plain attention, several with grouped
    queries. Known are ``nn.MultiheadAttention`` and modules with three linear layers of names in
    ``prunekit.structure.families`` (or one), another that reads the heads (in them or in the module around them) and an integer
    attribute in ``HEADS``, of theirs or of their ``config``. A linear layer may be transformers' ``Conv1D``.

    Raises:
        UsageError: a given mapping names a layer that does not exist, or is none that it can be.
    """
    found: list[Group] = []
    others: list[Group] = []
    refused: dict[str, str] = {}
    layers: set[str] = set()
    tied = tied_names(model)
    specs = [_checked(model, mapping) for mapping in _mappings(model, given)]
    known = rows(given)
    mapped = {_first(spec) for spec in specs}
    for name, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, NarrowAttention)):
            reason = _packed_reason(module)
            if reason is not None:
                refused[name] = reason
            else:
                found.append(_packed(name, module))
        elif (spec := _by_name(model, name, module, known)) is not None and _first(spec) not in mapped:
            specs.append(spec)
    for spec in specs:
        layers |= {spec[key] for key in ("q", "k", "v", "qkv") if spec.get(key)}
        name = _first(spec).rpartition(".")[0] or _first(spec)
        try:
            found.append(_fused(name, model, spec) if spec.get("qkv") else _separate(name, model, spec))
            if spec.get("qkv"):
                others.append(_fused(name, model, spec, by_head=True))
        except ValueError as error:
            refused[name] = str(error)
    for group in list(found):
        bound = next((m.rsplit("@", 1)[0] for m in group.members if m.rsplit("@", 1)[0] in tied), None)
        if bound is not None:
            found.remove(group)
            refused[group.name] = f"{bound} is tied to {tied[bound]}; surgery would untie them"
    return _sharing_bias(model, found), refused, layers, others


def _sharing_bias(model: nn.Module, groups: list[Group]) -> list[Group]:
    """Attention of a stack that shares one bias of positions (T5) made one group: the bias has as many heads as each of them."""
    found: dict[str, Group] = {}
    for group in groups:
        module = model.get_submodule(group.name)
        if not hasattr(module, f"has_{BIAS}"):
            found[group.name] = group
            continue
        stack = re.sub(r"(?:^|\.)\d+\.", ".*.", group.name, count=1)
        own = isinstance(getattr(module, BIAS, None), nn.Embedding)
        bias = {f"{group.name}.{BIAS}.weight@1": torch.arange(group.size).view(-1, 1)} if own else {}
        first = found.get(stack)
        before = (first.members, first.attributes) if first is not None else ({}, {})
        name = first.name if first is not None else group.name
        found[stack] = Group(name, {**before[0], **group.members, **bias}, {**before[1], **group.attributes})
    return list(found.values())


def _mappings(model: nn.Module, given: Mappings) -> list[Mapping[str, Any]]:
    """The mappings as they are, and those that the functions named among them make of the model."""
    found: list[Mapping[str, Any]] = []
    for one in given:
        if not isinstance(one, str):
            found += [one] if FAMILY not in one else []
            continue
        with theirs(f"structure.attention: {one}(model)"):
            made = list(load_object(one, "structure.attention")(model))
        if not all(isinstance(mapping, Mapping) for mapping in made):
            raise UsageError(f"structure.attention: {one}(model) must give mappings such as {{q: …, k: …, v: …, o: …, heads: 4}}")
        found += made
    return found


def _first(spec: Mapping[str, Any]) -> str:
    return str(spec.get("qkv") or spec.get("q"))


def _checked(model: nn.Module, mapping: Mapping[str, Any]) -> dict[str, Any]:
    modules = dict(model.named_modules())
    for key in ("qkv", "o") if mapping.get("qkv") else ("q", "k", "v", "o"):
        name = mapping.get(key)
        if not is_linear(modules.get(str(name))):
            raise UsageError(f"structure.attention: {key} is {name!r}, which is no linear layer of the model")
    parent = modules[_first(mapping).rpartition(".")[0]]
    heads = mapping.get("heads") or _said(parent, HEADS)
    if heads is None:
        raise UsageError(f"structure.attention: heads of {_first(mapping)} is not given, and no attribute says it")
    return {**mapping, "heads": heads, "kv_heads": mapping.get("kv_heads") or _said(parent, KV_HEADS)}


def is_linear(module: nn.Module | None) -> bool:
    """``nn.Linear``, or transformers' ``Conv1D``, which holds its weight turned."""
    return isinstance(module, nn.Linear) or (module is not None and type(module).__name__ == "Conv1D")


def _by_name(model: nn.Module, name: str, module: nn.Module, known: Sequence[Family]) -> dict[str, Any] | None:
    linear = {n for n, m in module.named_modules() if is_linear(m)}
    inside = [row for row in known if row.attention and linear.issuperset(row.attention)]
    family = next((row for row in inside if len(row.attention) == 3), next(iter(inside), None))
    if family is None:
        return None
    heads = _said(module, (*family.heads, *HEADS))
    if heads is None:
        return None
    outputs = list(dict.fromkeys(output for row in (*inside, *known) for output in row.outputs))
    prefix = around = f"{name}." if name else ""
    output = next((o for o in outputs if o in linear), None)
    if output is None and name:
        around = f"{name.rpartition('.')[0]}." if "." in name else ""
        beside = dict(model.get_submodule(around.removesuffix(".")).named_modules())
        output = next((o for o in outputs if is_linear(beside.get(o))), None)
    if output is None:
        return None
    kv_heads = _said(module, (*family.kv_heads, *KV_HEADS))
    if len(family.attention) == 1:
        return {"qkv": f"{prefix}{family.attention[0]}", "o": around + output, "heads": heads, "kv_heads": kv_heads}
    spec: dict[str, Any] = {key: prefix + layer for key, layer in zip("qkv", family.attention, strict=True)}
    return {**spec, "o": around + output, "heads": heads, "kv_heads": kv_heads}


def _said(module: nn.Module, names: Sequence[str]) -> int | None:
    """A number that the module says, or its configuration."""
    value = _attribute(module, names)[1]
    config = getattr(module, "config", None)
    if value is None and config is not None:
        value = next((v for n in names if isinstance(v := getattr(config, n, None), int) and not isinstance(v, bool)), None)
    return value


def _attribute(module: nn.Module, names: Sequence[str]) -> tuple[str | None, int | None]:
    for name in names:
        value = module.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return name, value
    return None, None


def _separate(name: str, model: nn.Module, spec: Mapping[str, Any]) -> Group:
    """Raises ValueError when the sizes do not fit the number of heads."""
    (q, k, v), heads = (sizes_of(model, spec[key])[0] for key in "qkv"), int(spec["heads"])
    inputs = sizes_of(model, spec["o"])[1]
    if q % heads:
        raise ValueError(f"{spec['q']} has {q} outputs, not a multiple of {heads} heads")
    size = q // heads
    units = int(spec["kv_heads"] or k // size)
    if units < 1 or heads % units or k != units * size or v % units:
        raise ValueError(f"{spec['k']} and {spec['v']} do not have the outputs of {units} key-value heads of {size}")
    value = v // units
    share = heads // units
    if inputs != heads * value:
        raise ValueError(f"{spec['o']} has {inputs} inputs, not those of {heads} heads of {value}")
    members: dict[str, Tensor] = {}
    for layer, block in ((spec["q"], share * size), (spec["k"], size), (spec["v"], value)):
        members |= rows_of(model, layer, torch.arange(units * block).view(units, block))
    members[axis_of(model, spec["o"], outputs=False)] = torch.arange(inputs).view(units, share * value)
    counted = ((HEADS, heads, share), (KV_HEADS, units, 1), (WIDTHS, heads * size, share * size))
    return Group(name, members, _counting(model, spec["q"], counted))


def _fused(name: str, model: nn.Module, spec: Mapping[str, Any], by_head: bool = False) -> Group:
    """Raises ValueError when the sizes do not fit the number of heads.

    Args:
        by_head: query, key and value of a head stand together, instead of all queries before all keys before all values.
    """
    (outputs, _), (_, inputs), heads = sizes_of(model, spec["qkv"]), sizes_of(model, spec["o"]), int(spec["heads"])
    if inputs % heads:
        raise ValueError(f"{spec['qkv']} has {outputs} outputs, not three times those of {heads} heads")
    size = inputs // heads
    units = int(spec.get("kv_heads") or heads)
    if units < heads and heads % units == 0 and outputs == (heads + 2 * units) * size:
        return _fused_grouped(name, model, spec, heads, units, size)
    if outputs != 3 * inputs:
        raise ValueError(f"{spec['qkv']} has {outputs} outputs, not three times those of {heads} heads")
    rows = torch.arange(heads * size).view(heads, size)
    three = torch.arange(outputs).view(heads, -1) if by_head else _three(rows)
    members = rows_of(model, spec["qkv"], three) | {axis_of(model, spec["o"], outputs=False): rows}
    return Group(name, members, _counting(model, spec["qkv"], ((HEADS, heads, 1), (WIDTHS, heads * size, size))))


def _fused_grouped(name: str, model: nn.Module, spec: Mapping[str, Any], heads: int, units: int, size: int) -> Group:
    """All queries before the fewer keys before the values."""
    share = heads // units
    queries = torch.arange(heads * size).view(units, share * size)
    keys = torch.arange(units * size).view(units, size) + heads * size
    rows = torch.cat([queries, keys, keys + units * size], 1)
    members = rows_of(model, spec["qkv"], rows) | {axis_of(model, spec["o"], outputs=False): queries}
    counted = ((HEADS, heads, share), (KV_HEADS, units, 1), (WIDTHS, heads * size, share * size))
    return Group(name, members, _counting(model, spec["qkv"], counted))


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


def sizes_of(model: nn.Module, layer: str) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    weight = model.get_parameter(f"{layer}.weight")
    outputs, inputs = weight.shape if isinstance(model.get_submodule(layer), nn.Linear) else reversed(weight.shape)
    return outputs, inputs


def axis_of(model: nn.Module, layer: str, outputs: bool) -> str:
    """``<weight>@<axis>`` of a linear layer's outputs, or of its inputs."""
    return f"{layer}.weight@{int(isinstance(model.get_submodule(layer), nn.Linear) != outputs)}"


def rows_of(model: nn.Module, layer: str, rows: Tensor) -> dict[str, Tensor]:
    """Members for some outputs of a linear layer, ``(units, block)``, those of its bias among them."""
    bias = getattr(model.get_submodule(layer), "bias", None)
    members = {axis_of(model, layer, outputs=True): rows}
    return members | ({f"{layer}.bias@0": rows.clone()} if bias is not None else {})


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
