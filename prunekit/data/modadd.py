"""Addition modulo a number, as token sequences: the task on which small transformers grok (Power et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.errors import UsageError


def modadd(
    modulus: int = 113, train: int = 4000, validation: int = 2000, scoring: int = 200, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Disjoint splits of all pairs a ≥ b; inputs ``(samples, 4)`` are the tokens ``a + b =``, labels ``(a + b) mod modulus``.

    Numbers are their own tokens, ``+`` is ``modulus`` and ``=`` is ``modulus + 1``. What training and validation leave goes to
    scoring and test; scoring first takes pairs that bring a number it lacks, since an embedding that no scoring sample touches
    would score 0.

    Args:
        modulus: at least 2; ``modulus (modulus + 1) / 2`` pairs.
        train, validation, scoring: sizes; the rest is for testing.
        seed: of the order in which pairs are dealt out.

    Raises:
        UsageError: the sizes leave nothing for testing, or one of them is not positive.
    """
    b, a = torch.triu_indices(modulus, modulus)
    if min(modulus - 1, train, validation, scoring) < 1 or train + validation + scoring >= len(a):
        raise UsageError(
            f"modadd: train {train}, validation {validation} and scoring {scoring} must each be at least 1 and leave pairs for "
            f"testing; modulus {modulus} makes {len(a)}"
        )
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    rest = order[train + validation :].tolist()
    seen: set[int] = set()
    first = []
    for pair in rest:
        if not {int(a[pair]), int(b[pair])} <= seen:
            first.append(pair)
            seen |= {int(a[pair]), int(b[pair])}
    taken = set(first)
    rest = first + [pair for pair in rest if pair not in taken]
    parts = {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": torch.tensor(rest[scoring:]),
        "scoring": torch.tensor(rest[:scoring]),
    }
    tokens = torch.stack([a, torch.full_like(a, modulus), b, torch.full_like(a, modulus + 1)], 1)
    return {name: (tokens[part], ((a + b) % modulus)[part]) for name, part in parts.items()}
