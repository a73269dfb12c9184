"""What identifies a set of weights: a hash of their bytes."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from prunekit.trajectory import Layout


def state_digest(flat: Tensor) -> str:
    """SHA-256 (32 hex digits) of a flat state's bytes: the identity of a set of weights."""
    return hashlib.sha256(flat.detach().cpu().contiguous().numpy().data).hexdigest()[:32]


def model_digest(model: nn.Module) -> str:
    """The same identity, from a model's present weights."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return state_digest(Layout.of(model).flatten(named))
