"""Which parameters may be pruned at all: weights of two or more axes, less the patterns to ignore."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from prunekit.errors import UsageError, nearest
from prunekit.trajectory.layout import Layout


def prunable_parameters(layout: Layout, ignore: Sequence[str] = ()) -> list[str]:
    """Names of prunable parameters, in model order. Biases and norm weights (one axis) never are.

    Args:
        ignore: shell-style patterns of full parameter names, such as ``classifier.*``.

    Raises:
        UsageError: a pattern matches no parameter, or nothing is left to prune.
    """
    names = [entry.name for entry in layout.parameters]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"prunable.ignore: {pattern!r} matches no parameter; {nearest(pattern, names)}")
    kept = [
        entry.name
        for entry in layout.parameters
        if len(entry.shape) >= 2 and not any(fnmatchcase(entry.name, pattern) for pattern in ignore)
    ]
    if not kept:
        raise UsageError(f"nothing to prune: no parameter of two or more axes is left of {', '.join(names)}")
    return kept
