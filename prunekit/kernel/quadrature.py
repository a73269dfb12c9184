"""Where along a step gradients are taken: fixed rules as nodes and weights on [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prunekit.errors import UsageError, nearest


def midpoint(nodes: int) -> tuple[list[float], list[float]]:
    """Composite midpoint rule: equal cells, their centres. Kinks (ReLU, max-pool) cost higher orders their gain."""
    return [(k + 0.5) / nodes for k in range(nodes)], [1.0 / nodes] * nodes


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre: exact for polynomials up to degree ``2 nodes - 1``; for smooth activations."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return [float(0.5 * (p + 1)) for p in points], [float(0.5 * w) for w in weights]


def left(nodes: int) -> tuple[list[float], list[float]]:
    """Left end points, as plain Loss Change Allocation with one node (Lan et al. 2019) takes them."""
    return [k / nodes for k in range(nodes)], [1.0 / nodes] * nodes


RULES: dict[str, Callable[[int], tuple[list[float], list[float]]]] = {
    "midpoint": midpoint,
    "gauss-legendre": gauss_legendre,
    "left": left,
}


def get_rule(rule: str, nodes: int) -> list[tuple[float, float]]:
    """``[(node, weight)]`` of a rule.

    Raises:
        UsageError: unknown rule, or fewer than one node.
    """
    if rule not in RULES:
        raise UsageError(f"quadrature rule {rule!r} does not exist; {nearest(rule, list(RULES))}")
    if nodes < 1:
        raise UsageError(f"quadrature needs at least one node, got {nodes}")
    return list(zip(*RULES[rule](nodes), strict=True))
