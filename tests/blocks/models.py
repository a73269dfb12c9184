"""Tiny models for layer-wise pruning, and calibration samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.transformer_models import built


def family(name: str, samples: int = 12) -> tuple[nn.Module, list[tuple[dict[str, Tensor], None]]]:
    """A model of transformers and batches of random samples in the form of its inputs."""
    model, inputs = built(name)
    generator = torch.Generator().manual_seed(2)

    def some(given: Tensor) -> Tensor:
        shape = (samples // 2, *given.shape[1:])
        if given.is_floating_point():
            return torch.randn(shape, generator=generator)
        return torch.randint(3, 40, shape, generator=generator)

    return model.double(), [({key: _double(some(value)) for key, value in inputs.items()}, None) for _ in range(2)]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class Residual(nn.Module):
    """A block with keyword arguments, of which one is shared by all blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Any]:
        return x + scale * self.outer(torch.relu(self.inner(x))), None


class Blocks(nn.Module):
    """Blocks that hand on a tuple's first tensor; ``between`` is what the model does to it on the way."""

    def __init__(self, width: int = 8, blocks: int = 3, between: Any = None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = block(h, scale=torch.tensor(0.5, dtype=h.dtype))[0]
            h = h if self.between is None else self.between(h)
        found: Tensor = self.head(h)
        return found


def blocks(**options: Any) -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    torch.manual_seed(0)
    model = Blocks(**options).double()
    return model, [(torch.randn(10, 5, 4, dtype=torch.float64), None) for _ in range(3)]
