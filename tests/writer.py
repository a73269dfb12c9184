"""A language model that takes no library: two blocks, each looking one token back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit import Plan, Trajectory, make_plan, score


class Block(nn.Module):
    """Looks one token back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([x[:, :1], x[:, :-1]], 1)
        found: Tensor = x + self.down(torch.tanh(self.up(self.norm(x + before))))
        return found


class Writer(nn.Module):
    """Tokens ``(samples, places)`` to logits; rows of ``down`` end with half a run of 4 where ``hidden`` is 26."""

    def __init__(self, vocabulary: int = 30, width: int = 16, hidden: int = 26) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.blocks = nn.ModuleList([Block(width, hidden), Block(width, hidden)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


def plan_of(model: nn.Module, sparsity: float | None = 0.5, structure: str = "unstructured") -> Plan:
    """By magnitude, of the blocks alone."""
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=["embed*", "head*"])
    example = torch.zeros(1, 12, dtype=torch.long) if structure == "channels" else None
    return make_plan(scores, model, example, sparsity=sparsity, structure=structure)
