"""What can be removed at once: the structures by name, patterns such as ``2:4`` and ``block:4x1`` included."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prunekit.errors import UsageError, nearest
from prunekit.structure.find import GROUPED
from prunekit.structure.joined import parts_of

STRUCTURES = ("unstructured", *GROUPED)
"""Structures without numbers in their names; see ``KNOWN`` for the patterns."""

KNOWN = f"{', '.join(STRUCTURES)}, units joined such as heads+neurons, N:M such as 2:4, block:ROWSxCOLUMNS such as block:4x1"
LARGEST = 4096


@dataclass(frozen=True)
class Pattern:
    """``nm``: of every ``second`` consecutive weights of a row, ``first`` stay. ``block``: tiles of ``first`` × ``second``."""

    kind: str
    first: int
    second: int


def pattern_of(structure: str) -> Pattern | None:
    """The pattern that a name stands for; None for names without numbers.

    Raises:
        UsageError: it looks like a pattern and is none (``4:2``, ``block:0x1``).
    """
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", structure):
        stay, of = int(match[1]), int(match[2])
        if not 1 <= stay < of <= LARGEST:
            raise UsageError(f"structure {structure!r}: N:M keeps N of every M weights; 1 <= N < M <= {LARGEST} must hold")
        return Pattern("nm", stay, of)
    if match := re.fullmatch(r"block:(\d{1,9})x(\d{1,9})", structure):
        rows, columns = int(match[1]), int(match[2])
        if not (1 <= rows <= LARGEST and 1 <= columns <= LARGEST):
            raise UsageError(f"structure {structure!r}: rows and columns of a block must be from 1 to {LARGEST}")
        return Pattern("block", rows, columns)
    return None


def check_structure(structure: str) -> None:
    """Raises UsageError for an unknown structure; a user's own is imported when groups are looked for."""
    if structure == "unstructured" or structure in GROUPED or pattern_of(structure) is not None:
        return
    if len(parts := parts_of(structure)) > 1:
        if (masks := next((p for p in parts if p == "unstructured" or pattern_of(p) is not None), None)) is not None:
            others = "+".join(part for part in parts if part != masks) or "units"
            raise UsageError(
                f"structure {structure!r}: {masks} masks single weights and can be joined with nothing; prune {others} first, "
                f"then {masks} of what is left"
            )
        raise UsageError(str(GROUPED.fault(structure)))
    near = nearest(structure, ["unstructured", *GROUPED.names()])
    meant = "" if near.startswith("known") else f"{near} "
    raise UsageError(f"structure {structure!r} does not exist; {meant}known: {KNOWN}, or module:structure of your own")


def takes_sizes(structure: str) -> bool:
    """Whether ``round_to`` and ``min_units`` are about it. Raises UsageError for one that cannot be imported."""
    return structure in GROUPED and GROUPED[structure].sized


def implied_sparsity(structure: str) -> float | None:
    """The share that N:M removes; None for structures that need to be told."""
    pattern = pattern_of(structure)
    return 1 - pattern.first / pattern.second if pattern is not None and pattern.kind == "nm" else None


def asked_sparsity(structure: str, sparsity: float | None) -> float:
    """The share to remove: what was asked for, or for N:M what the pattern says.

    Raises:
        UsageError: none given where one is needed, out of [0, 1), or another than the pattern's.
    """
    implied = implied_sparsity(structure)
    if implied is not None:
        if sparsity is not None and f"{sparsity:g}" != f"{implied:g}":
            raise UsageError(f"sparsity is {sparsity}; {structure} removes {implied:g}: leave it out, or take another pattern")
        return implied
    if sparsity is None:
        raise UsageError(f"structure {structure!r} needs a sparsity (the share of weights removed)")
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is {sparsity}; it must be at least 0 and below 1 (the share of weights removed)")
    return sparsity
