"""Which parameters are a layer's weights, and which of their axes are outputs and inputs: one table, by class name.

A weight is what a layer multiplies its inputs with. Position embeddings, class tokens, layer scales, norm weights and biases
are parameters, but no weights. A layer of your own takes one entry::

    from prunekit.structure.roles import ROLES, Role
    ROLES["MyLinear"] = {"kernel": Role(output=1, input=0)}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn


@dataclass(frozen=True)
class Role:
    """A weight's axes.

    Attributes:
        output: axis of its layer's outputs.
        input: axis of its layer's inputs.
        direction: it is divided by its norm over everything but ``output`` (weight normalisation), so that an output whose
            numbers are all 0 has no value: one of them always stays.
    """

    output: int = 0
    input: int = 1
    direction: bool = False


ROWS, COLUMNS = Role(), Role(output=1, input=0)
NONE: Mapping[str, Role] = {}

ROLES: dict[str, Mapping[str, Role]] = {
    "Linear": {"weight": ROWS},
    "Conv1d": {"weight": ROWS},
    "Conv2d": {"weight": ROWS},
    "Conv3d": {"weight": ROWS},
    "ConvTranspose1d": {"weight": COLUMNS},
    "ConvTranspose2d": {"weight": COLUMNS},
    "ConvTranspose3d": {"weight": COLUMNS},
    "Conv1D": {"weight": COLUMNS},  # of transformers: a linear layer that holds (inputs, outputs)
    "Bilinear": {"weight": ROWS},
    "Embedding": {"weight": ROWS},
    "EmbeddingBag": {"weight": ROWS},
    "MultiheadAttention": {"*_proj_weight": ROWS},
    "NarrowAttention": {"*_proj_weight": ROWS},
    "RNNBase": {"weight_*": ROWS},
    "RNNCellBase": {"weight_*": ROWS},
    "*Experts": {"gate_up_proj": Role(1, 2), "down_proj": Role(1, 2)},  # of transformers: (experts, outputs, inputs)
    "_NormBase": NONE,
    "LayerNorm": NONE,
    "GroupNorm": NONE,
    "RMSNorm": NONE,
    "PReLU": NONE,
}
"""Class name, as a shell-style pattern (a base class counts) -> its weights' names, as patterns, and their axes.

A layer of another class that holds no other modules has the weights that are called ``weight``, outputs first.
"""

POSITIONS = ("*position*", "*pos_emb*", "*pos_enc*", "wpe")
"""Names of embeddings that are tables of positions, which are no weights."""


def weight_roles(model: nn.Module) -> dict[str, Role]:
    """Every weight of the model by its name, with its axes; tied weights under each of their names."""
    modules = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, short = name.rpartition(".")
        role = _role(modules, path, short)
        if role is not None and parameter.dim() > max(role.output, role.input):
            found[name] = role
    return found


def _role(modules: Mapping[str, nn.Module], path: str, short: str) -> Role | None:
    module = modules[path]
    if type(module).__name__ in ("ParametrizationList", "ParametrizedParameterList") or ".parametrizations." in f".{path}.":
        owner, _, which = path.rpartition("parametrizations.")
        role = _role(modules, owner.removesuffix("."), which) if "." not in which else None
        if short == "original1":
            return None if role is None else replace(role, direction=True)
        return role if short == "original" else None
    if short.endswith("_orig"):  # as torch.nn.utils.prune and the older spectral_norm call it
        short = short.removesuffix("_orig")
    elif short.endswith("_v") and hasattr(module, f"{short[:-2]}_g"):  # as the older weight_norm does
        role = _role(modules, path, short[:-2])
        return None if role is None else replace(role, direction=True)
    table = _table(module)
    if table is None:
        return ROWS if short == "weight" and next(module.children(), None) is None else None
    if isinstance(module, nn.Embedding) and any(fnmatchcase(path.rpartition(".")[2], pattern) for pattern in POSITIONS):
        return None
    return next((role for pattern, role in table.items() if fnmatchcase(short, pattern)), None)


def _table(module: nn.Module) -> Mapping[str, Role] | None:
    for kind in type(module).__mro__:
        for pattern, table in ROLES.items():
            if fnmatchcase(kind.__name__, pattern):
                return table
    return None
