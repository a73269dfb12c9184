"""Models whose channels depend on each other in the ways that matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Scores
from prunekit.criteria import model_digest
from prunekit.trajectory import Layout

IMAGES = torch.randn(2, 1, 4, 4)


def random_scores(model: nn.Module, seed: int = 0, levels: int | None = None) -> Scores:
    """Scores as a file would hold them; with ``levels``, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    names = [e.name for e in Layout.of(model).parameters if len(e.shape) >= 2]
    shapes = {e.name: e.shape for e in Layout.of(model)}
    importance = {n: torch.rand(shapes[n], generator=generator) for n in names}
    if levels is not None:
        importance = {n: (v * levels).floor() for n, v in importance.items()}
    facts = {
        "criterion": "magnitude", "group": "l2", "aggregation": None, "trajectory": "t", "model": model_digest(model),
        "prunable": names,
    }  # fmt: skip
    return Scores(importance, {}, facts)


class Flattened(nn.Module):
    """A convolution whose channels become blocks of a linear layer's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 16, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(self.conv(x)).flatten(1))))


class Residual(nn.Module):
    """Two convolutions whose outputs are added: their channels go together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.out((x + F.relu(self.inner(x))).mean((2, 3)))


class Joined(nn.Module):
    """Two branches side by side: each keeps its own range of the next layer's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 4, 3, padding=1)
        self.right = nn.Conv2d(1, 6, 1)
        self.mix = nn.Conv2d(10, 5, 3)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], 1)
        return self.out(F.relu(self.mix(x)).mean((2, 3)))


class Multilayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 9), nn.Linear(9, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


HANDLED: dict[str, Callable[[], nn.Module]] = {
    "flattened": Flattened,
    "residual": Residual,
    "joined": Joined,
    "multilayer": Multilayer,
}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.out = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.one(x.flatten(1)))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


class Counting(nn.Module):
    """A mean over channels: removing some changes what the mean divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.one(x.flatten(1)))
        return self.out(hidden - hidden.mean(1, keepdim=True))


class Squashed(nn.Module):
    """A removed channel would send 0.5, but what receives it leaves with it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.one(x.flatten(1))))


HANDLED["squashed"] = Squashed

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (Normed, r"norm is a LayerNorm"),
    "grouped": (Grouped, r"two is a grouped convolution"),
    "tied": (Tied, r"two\.weight is tied to one\.weight"),
    "output only": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), "only its output layer"),
}
