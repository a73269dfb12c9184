"""Which parameters may be pruned, and which layers may lose nothing: weights by their role, less the patterns to ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from prunekit.errors import UsageError, nearest
from prunekit.structure.roles import weight_roles
from prunekit.trajectory.layout import Layout


def prunable_parameters(model: nn.Module, layout: Layout, ignore: Sequence[str] = (), include: Sequence[str] = ()) -> list[str]:
    """Names of prunable parameters, in model order: the weights of layers (``prunekit.structure.roles``).

    Args:
        model: of the recorded architecture; only what its layers are is looked at.
        ignore: shell-style patterns of full parameter names, such as ``classifier.*``; of a tied weight any of its names.
        include: patterns of parameters of two or more axes that may be pruned though they are no layer's weights, such as
            ``positions``.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left to prune.
    """
    shapes = {entry.name: entry.shape for entry in layout.parameters}
    names = _all_names(model, shapes)
    for what, patterns in (("ignore", ignore), ("include", include)):
        for pattern in patterns:
            if not _matching(names, [pattern]):
                raise UsageError(f"prunable.{what}: {pattern!r} matches no parameter; {nearest(pattern, list(names))}")
    for pattern in include:
        if all(len(shapes[name]) < 2 for name in _matching(names, [pattern])):
            raise UsageError(f"prunable.include: {pattern!r} matches only parameters of fewer than two axes, which stay whole")
    weights = weight_roles(model)
    asked = {name for name in _matching(names, include) if len(shapes[name]) >= 2}
    ignored = set(_matching(names, ignore))
    kept = [name for name in names if (name in weights or name in asked) and name not in ignored]
    if not kept and ignored & (weights.keys() | asked):
        patterns = ", ".join(map(repr, ignore))
        raise UsageError(f"nothing is left to prune: prunable.ignore ({patterns}) covers every layer's weight")
    if not kept:
        raise UsageError(f"nothing to prune: none of {len(names)} parameters is a layer's weight; see prunable.include")
    return kept


def kept_layers(model: nn.Module, ignore: Sequence[str]) -> list[str]:
    """Layers that a pattern covers whole (``classifier.*``, not ``classifier.weight``): these lose nothing, inputs included."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    return sorted(owner for owner in owners if any(fnmatchcase(f"{owner}.\0", pattern) for pattern in ignore))


def _all_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Each parameter's name, with all that the model has for it: a tied output layer is the embedding too."""
    own: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own.setdefault(id(parameter), []).append(name)
    of = {name: every for every in own.values() for name in every}
    return {name: of.get(name, [name]) for name in names}


def _matching(names: Mapping[str, Sequence[str]], patterns: Sequence[str]) -> list[str]:
    return [name for name, every in names.items() if any(fnmatchcase(one, pattern) for one in every for pattern in patterns)]
