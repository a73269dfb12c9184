"""What a mixture's experts are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """Tokens on their way to experts.

    Attributes:
        hidden: ``(tokens, width)``.
        chosen: numbers of the experts that each goes to, ``(tokens, k)``; one beyond the last means none.
        weights: of what these give, ``(tokens, k)``.
    """

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


def routed_of(args: Sequence[Any], keywords: Mapping[str, Any]) -> Routed | None:
    """What is known by its shape and kind among the arguments; None where something is not there."""
    given = [value for value in (*args, *keywords.values()) if isinstance(value, Tensor)]
    floating = [value for value in given if value.is_floating_point()]
    chosen = next((value for value in given if not value.is_floating_point() and value.dtype != torch.bool), None)
    if chosen is None or not floating:
        return None
    weights = next((value for value in floating if value.shape == chosen.shape), None)
    hidden = next((value for value in floating if value is not weights), None)
    return None if weights is None or hidden is None else Routed(hidden, chosen, weights)
