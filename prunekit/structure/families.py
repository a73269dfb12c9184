"""What families of transformers call the layers of their blocks: one row a family, which a recipe extends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.structure.structure import Mappings

FAMILY = "family"
"""Key of a mapping that is a row of this table, which the user gave."""


@dataclass(frozen=True)
class Family:
    """Names of layers as they are reached from one module, such as ``up_proj`` or ``output.dense``.

    Attributes:
        attention: the layers that make queries, keys and values; one name where one layer makes them all.
        outputs: what the layer that reads the heads is called, in the same module or in the one around it.
        mlps: layers whose outputs are neurons, and the layer that reads them.
        router: the layer that chooses experts, beside ``experts``, the module that holds all of them in tensors
            ``(experts, outputs, inputs)``.
        heads: attributes with the number of heads, and ``kv_heads`` of key-value heads, where they have a name of their own. They
            are read; only those of usual names are lowered (``SIZE_ATTRIBUTES``), since a plan is data.
    """

    attention: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    mlps: tuple[tuple[tuple[str, ...], str], ...] = ()
    router: str = ""
    experts: str = ""
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()


SEPARATE = ("q_proj", "k_proj", "v_proj")
FC = (("fc1",), "fc2")

FAMILIES: dict[str, Family] = {
    "llama, mistral, qwen2, qwen3, gemma": Family(SEPARATE, ("o_proj",), ((("gate_proj", "up_proj"), "down_proj"),)),
    "opt, whisper, clip": Family(SEPARATE, ("out_proj",), (FC,)),
    "t5": Family(("q", "k", "v"), ("o",), ((("wi_0", "wi_1"), "wo"), (("wi",), "wo"))),
    "prunekit": Family(("query", "key", "value"), ("out",)),
    "llama, as its authors wrote it": Family(("wq", "wk", "wv"), ("wo",), ((("w1", "w3"), "w2"),)),
    "vit": Family(("qkv",), ("proj", "o_proj"), (FC,)),
    "diffusers": Family(("to_q", "to_k", "to_v"), ("to_out", "to_out.0")),
    "distilbert": Family(("q_lin", "k_lin", "v_lin"), ("out_lin",), ((("lin1",), "lin2"),)),
    "phi": Family(SEPARATE, ("dense",), (FC,)),
    "phi3": Family(("qkv_proj",), ("o_proj",), ((("gate_up_proj",), "down_proj"),)),
    "gpt_neox": Family(("query_key_value",), ("dense",), ((("dense_h_to_4h",), "dense_4h_to_h"),)),
    "gpt2": Family(("c_attn",), ("c_proj",), ((("c_fc",), "c_proj"),)),
    "bert, roberta": Family(("query", "key", "value"), ("output.dense", "output"), ((("intermediate.dense",), "output.dense"),)),
    "mixtral, qwen2_moe, qwen3_moe": Family(SEPARATE, ("o_proj",), router="gate", experts="experts"),
    "others": Family(("in_proj",), ("out_proj",)),
    "flash-attention": Family(("Wqkv",), ("out_proj",)),
}
"""By the names that transformers gives its families; any model whose layers have a row's names is read by it."""


def rows(given: Mappings = ()) -> list[Family]:
    """Rows of the table, the user's own first."""
    own = [row(mapping[FAMILY]) for mapping in given if isinstance(mapping, Mapping) and FAMILY in mapping]
    return [*own, *FAMILIES.values()]


def row(said: Family | Mapping[str, Any]) -> Family:
    """A row as a recipe says it: ``{q, k, v, o}`` or ``{qkv, o}``, ``{up: [gate, up], down}``, ``{router, experts}``."""
    if isinstance(said, Family):
        return said
    separate = tuple(said[key] for key in ("q", "k", "v") if said.get(key))
    up = said.get("up") or ()
    return Family(
        (said["qkv"],) if said.get("qkv") else separate,
        (said["o"],) if said.get("o") else (),
        (((up,) if isinstance(up, str) else tuple(up), said["down"]),) if up else (),
        said.get("router") or "",
        said.get("experts") or "",
        (said["heads"],) if said.get("heads") else (),
        (said["kv_heads"],) if said.get("kv_heads") else (),
    )


def below(module: nn.Module, path: str) -> nn.Module | None:
    """The module that a path leads to; None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = found._modules.get(name) if isinstance(found, nn.Module) else None
    return found if isinstance(found, nn.Module) else None


def joined(name: str, path: str) -> str:
    """The full name of what is reached from a module."""
    return f"{name}.{path}" if name else path


def experts_of(model: nn.Module, given: Mappings = ()) -> Iterator[tuple[str, nn.Module, str, str]]:
    """Every mixture of experts: its name and module, and the full names of its router and of what holds the experts."""
    known = [each for each in rows(given) if each.router and each.experts]
    for name, module in model.named_modules():
        for each in known:
            if below(module, each.router) is not None and below(module, each.experts) is not None:
                yield name, module, joined(name, each.router), joined(name, each.experts)
                break
