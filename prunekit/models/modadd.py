"""The one-layer transformer that groks modular addition, as ExPLAIND's authors trained it (arXiv 2505.20076, section 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import UsageError


class SharedAttention(nn.Module):
    """Self-attention whose one projection is query, key and value at once; only the last position asks.

    No biases and no residual connection. Heads start as separate layers would: the output projection sees ``width / heads``
    inputs a head, which is what its initial range goes by.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"attention: {heads} heads do not divide a width of {width}")
        self.heads = heads
        self.projection = nn.Linear(width, width, bias=False)
        self.combine = nn.Linear(width, width, bias=False)
        bound = (width // heads) ** -0.5
        nn.init.uniform_(self.combine.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``(samples, positions, width) -> (samples, width)``."""
        p = self.projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        weights = ((p[:, :, -1:] @ p.mT) / p.shape[-1] ** 0.5).softmax(-1)
        mixed: Tensor = self.combine((weights @ p).flatten(1))
        return mixed


class ModAddTransformer(nn.Module):
    """Scaled embedding, attention, an MLP added to its own input, a classifier over all tokens; no positions, no norms."""

    def __init__(self, modulus: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        tokens = modulus + 2
        self.scale = width**0.5
        self.embedding = nn.Embedding(tokens, width)
        self.attention = SharedAttention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Positions after the attention do not meet again, so what is not decoded need not be computed.
        x = self.attention(self.embedding(x) * self.scale)
        logits: Tensor = self.classifier(x + F.relu(self.down(F.relu(self.up(x)))))
        return logits


def modadd_transformer(modulus: int = 113, width: int = 64, heads: int = 4, hidden: int = 512) -> nn.Module:
    """Tokens ``a + b =``, ``(samples, 4) -> (samples, modulus + 2)``; 89,024 parameters at the default size."""
    return ModAddTransformer(modulus, width, heads, hidden)
