"""Plans to a budget instead of a sparsity: how much must go, or may go, found by trying."""

from __future__ import annotations

from collections.abc import Callable

from prunekit.progress import Bar

HIGHEST = 0.999
GRID = (0.98, 0.95, 0.92, 0.89, 0.86, 0.83, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
"""Where ``most`` looks, from small models to large ones."""
HALVINGS = 3
TRIES = len(GRID) + HALVINGS
"""How many models ``most`` looks at, at most."""


def least(size: Callable[[float], float], budget: float, halvings: int = 12) -> tuple[float, float]:
    """The least sparsity with which ``size`` is within ``budget``, by halving [0, 0.999].

    Args:
        size: sparsity -> parameters, MACs, bytes or milliseconds; falls with sparsity, up to noise.

    Returns:
        sparsity, to ``2^-halvings``, and the size there, which was within the budget when it was looked at. When even the
        highest sparsity is over it, that one and its size.
    """
    with Bar("budget (plans tried)", halvings + 2) as bar:
        low, high = 0.0, HIGHEST
        whole = size(low)
        bar.advance()
        if whole <= budget:
            return low, whole
        reached = size(high)
        bar.advance()
        if reached > budget:
            return high, reached
        for _ in range(halvings):
            middle = (low + high) / 2
            found = size(middle)
            bar.advance()
            if found <= budget:
                high, reached = middle, found
            else:
                low = middle
    return high, reached


def most(accuracy: Callable[[float], float], floor: float, halvings: int = HALVINGS) -> tuple[float, float] | None:
    """The highest sparsity with which ``accuracy`` is at least ``floor``: down a grid, then halving the last gap.

    Accuracy does not fall evenly with sparsity, so this is the smallest model that was *seen* to hold, and no proof that no
    smaller one would.

    Returns:
        sparsity and accuracy there; None when nothing on the grid holds.
    """
    above = 1.0
    with Bar("budget (plans tried)", len(GRID) + halvings) as bar:
        for sparsity in GRID:
            found = accuracy(sparsity)
            bar.advance()
            if found >= floor:
                break
            above = sparsity
        else:
            return None
        for _ in range(halvings if above < 1 else 0):
            middle = (sparsity + above) / 2
            tried = accuracy(middle)
            bar.advance()
            if tried >= floor:
                sparsity, found = middle, tried
            else:
                above = middle
    return sparsity, found
