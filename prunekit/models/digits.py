"""Small nets for 8×8 images: convolutional, fully connected, and a transformer over the image's rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import UsageError

SIDE = 8


class DigitsCNN(nn.Module):
    """Three 3×3 convolutions (the second with stride 2), mean pooling, a linear classifier."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.classifier = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class DigitsMLP(nn.Module):
    """Two hidden ReLU layers and a linear classifier."""

    def __init__(self, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second = hidden
        self.hidden1 = nn.Linear(SIDE * SIDE, first)
        self.hidden2 = nn.Linear(first, second)
        self.classifier = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden1(x.flatten(1)))
        logits: Tensor = self.classifier(F.relu(self.hidden2(x)))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention with separate projections; ``kv_heads`` below ``heads`` shares keys and values.

    Shares are grouped queries (Ainslie et al. 2023): query head ``h`` looks at key-value head ``h // (heads / kv_heads)``.
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        if width % heads or heads % self.kv_heads:
            raise UsageError(f"attention: width {width}, heads {heads} and kv_heads {self.kv_heads} must divide each other")
        size = width // heads
        self.q_proj = nn.Linear(width, heads * size)
        self.k_proj = nn.Linear(width, self.kv_heads * size)
        self.v_proj = nn.Linear(width, self.kv_heads * size)
        self.o_proj = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        weights = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        mixed: Tensor = self.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """A pre-norm transformer layer: attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int, kv_heads: int | None, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, kv_heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mlp: Tensor = self.down(F.relu(self.up(self.norm2(x))))
        return x + mlp


class DigitsTransformer(nn.Module):
    """The 8 rows as 8 tokens, learned positions, pre-norm layers, mean pooling, a linear classifier."""

    def __init__(self, width: int, layers: int, heads: int, kv_heads: int | None, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(SIDE, width)
        self.positions = nn.Parameter(0.02 * torch.randn(SIDE, width))
        self.layers = nn.ModuleList(Block(width, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.squeeze(1)) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classifier(self.norm(x).mean(1))
        return logits


def digits_cnn(channels: Sequence[int] = (32, 64, 64), classes: int = 10) -> nn.Module:
    """``(samples, 1, 8, 8) -> (samples, classes)``; 56,394 parameters at the default width."""
    return DigitsCNN(channels, classes)


def digits_mlp(hidden: Sequence[int] = (256, 128), classes: int = 10) -> nn.Module:
    """``(samples, 1, 8, 8) -> (samples, classes)``; 50,826 parameters at the default width."""
    return DigitsMLP(hidden, classes)


def digits_transformer(
    width: int = 32, layers: int = 2, heads: int = 4, kv_heads: int | None = None, hidden: int | None = None, classes: int = 10
) -> nn.Module:
    """``(samples, 1, 8, 8) -> (samples, classes)``; 26,346 parameters at the default width.

    Args:
        kv_heads: key-value heads; None for as many as ``heads``.
        hidden: of the MLPs; None for 4 × ``width``.
    """
    return DigitsTransformer(width, layers, heads, kv_heads, hidden or 4 * width, classes)
