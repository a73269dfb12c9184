"""What all processes noted for one step, as one: the gradient is the mean of theirs, so each counts an equal part."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import UsageError


def told(line: Mapping[str, Any], random: Sequence[Tensor]) -> dict[str, Any]:
    """One process's notes, for ``gathered``: JSON values."""
    return {"line": dict(line), "random": [as_text(state) for state in random]}


def gathered(found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[Tensor], str]:
    """The notes of all processes as those of one step: their micro-batches one process after the other.

    A micro-batch's factor in the step's gradient is its factor in its own process, 1 / (micro-batches there) where none was
    noted, over the number of processes: DDP and ``fully_shard`` average gradients so, also where batches differ in size.

    Returns:
        the line, the random states, and why samples are not known although some were noted; empty where they are.

    Raises:
        UsageError: processes clipped by different factors.
    """
    lines: list[dict[str, Any]] = [dict(one["line"]) for one in found]
    line: dict[str, Any] = {}
    factors = [one["gradient_scale"] for one in lines if "gradient_scale" in one]
    if factors:
        if any(not math.isclose(factor, factors[0], rel_tol=1e-5) for factor in factors):
            raise UsageError(
                f"Recorder: processes clipped one step's gradient by different factors ({min(factors):.6g} to "
                f"{max(factors):.6g}); clip by the norm of the whole gradient"
            )
        line["gradient_scale"] = factors[0]
    counts = [len(one.get("batches", ())) for one in lines]
    if not any(counts):
        return line, _random(found), ""
    if not all(counts):
        return line, [], f"process {counts.index(0)} noted none"
    even = len(set(counts)) == 1
    if not even and any(weight is None for one in lines for weight in one["weights"]):
        return line, [], f"processes noted {min(counts)} to {max(counts)} micro-batches of one step, without their weights"
    plain = even and all(weight is None for one in lines for weight in one["weights"])
    line["batches"] = [batch for one in lines for batch in one["batches"]]
    line["seeds"] = [seed for one in lines for seed in one["seeds"]]
    line["weights"] = [
        None if plain else (1 / count if weight is None else weight) / len(lines)
        for one, count in zip(lines, counts, strict=True)
        for weight in one["weights"]
    ]
    return line, _random(found), ""


def as_text(state: Tensor) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def as_bytes(text: str) -> Tensor:
    """The same, read: ``(bytes,)``."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _random(found: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [as_bytes(text) for one in found for text in one["random"]]
