"""What identifies a set of weights: a hash of their bytes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from prunekit.trajectory import Layout
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.layout import path_dtype


def state_digest(flat: Tensor) -> str:
    """SHA-256 (32 hex digits) of a flat state's bytes: the identity of a set of weights."""
    return hashlib.sha256(flat.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()[:32]


def model_digest(model: nn.Module) -> str:
    """The same identity, from a model's present weights, as a path of them holds them (float32, or float64)."""
    layout = Layout.of(model)
    return state_digest(layout.flatten(named_tensors(model), out=torch.empty(layout.total, dtype=path_dtype(model))))
