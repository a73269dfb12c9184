"""Models that people write themselves: taggers, encoders, autoencoders, several inputs or outputs, every simple task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import CLASSES, NO_ATTENTION, NO_BLOCKS, Entry, images, maps, splits, vectors


class Tagger(nn.Module):
    """A class for every word, by a recurrent net in both directions."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 12)
        self.recurrent = kind(12, 16, num_layers=layers, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.recurrent(self.embedding(ids))
        return self.classifier(out)


def _sentences(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 32, (n, 8), generator=g)
    return ids, (ids % CLASSES).masked_fill(torch.arange(8) >= 7, -100)


class Encoder(nn.Module):
    """torch's own transformer encoder on a sequence of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, 16)
        self.position = nn.Parameter(torch.randn(1, 8, 16) * 0.1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.inputs(x) + self.position).mean(1))


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv1d(16, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip


class UNet(nn.Module):
    """Down once, up once, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = _double(3, 8)
        self.middle = _double(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join = _double(16, 8)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        up = self.up(self.middle(F.max_pool2d(down, 2)))
        return self.out(self.join(torch.cat([down, up], 1)))


def _double(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
    )  # fmt: skip


class VAE(nn.Module):
    """Answers the reconstruction, the mean and the logarithm of the variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


class TwoInputs(nn.Module):
    """A picture and numbers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.numbers = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, picture: Tensor, numbers: Tensor) -> Tensor:
        return self.classifier(torch.cat([self.picture(picture), self.numbers(numbers)], 1))


def _two_inputs(n: int, g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    y = torch.randint(0, CLASSES, (n,), generator=g)
    picture = torch.randn(n, 1, 8, 8, generator=g) + y.view(-1, 1, 1, 1)
    return (picture, torch.randn(n, 5, generator=g)), y


class TwoOutputs(nn.Module):
    """Logits, and features beside them, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.classifier = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"logits": self.classifier(features), "features": features}


class Graph(nn.Module):
    """Two graph convolutions over a dense adjacency matrix, then the mean over nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        hidden = torch.relu(adjacency @ self.first(nodes))
        return self.classifier(torch.relu(adjacency @ self.second(hidden)).mean(1))


def _graphs(n: int, g: torch.Generator) -> dict[str, Tensor]:
    y = torch.randint(0, CLASSES, (n,), generator=g)
    adjacency = (torch.rand(n, 7, 7, generator=g) < 0.4).float() + torch.eye(7)
    nodes = torch.randn(n, 7, 6, generator=g) + 0.5 * y.view(-1, 1, 1)
    return {"nodes": nodes, "adjacency": adjacency / adjacency.sum(-1, keepdim=True), "labels": y}


def _mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, outputs))


def _regression(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 10, generator=g)
    return x, x[:, :1] - 0.5 * x[:, 1:2]


def _binary(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 10, generator=g)
    return x, (x[:, :1] > 0).float()


def _multi_label(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 10, generator=g)
    return x, (x[:, :CLASSES] > 0).float()


def vae_loss(heads: tuple[Tensor, ...], inputs: Tensor) -> Tensor:
    """Squared error of the reconstruction, and the divergence from a standard normal distribution."""
    found, mean, log_variance = heads
    return F.mse_loss(found, inputs) - 0.1 * (1 + log_variance - mean.square() - log_variance.exp()).mean()


def _themselves(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 24, generator=g)
    return x, x


PLAIN = {**NO_ATTENTION, **NO_BLOCKS}

MODELS = {
    "lstm_tagger": Entry(
        lambda: Tagger(nn.LSTM), lambda: splits(_sentences), "token_classification", senseless=PLAIN, fast=True
    ),
    "gru_tagger": Entry(lambda: Tagger(nn.GRU, 2), lambda: splits(_sentences), "token_classification", senseless=PLAIN),
    "transformer_encoder": Entry(Encoder, vectors(8, 4)),
    "conv1d": Entry(_conv1d, vectors(3, 24), senseless=PLAIN),
    "unet": Entry(UNet, maps(16), "segmentation", senseless=PLAIN, fast=True),
    "vae": Entry(VAE, lambda: splits(_themselves), "heads", "benchmarks.zoo.plain_models:vae_loss", PLAIN, fast=True),
    "two_inputs": Entry(TwoInputs, lambda: splits(_two_inputs), senseless=PLAIN),
    "two_outputs": Entry(TwoOutputs, vectors(10), senseless=PLAIN),
    "regression": Entry(lambda: _mlp(1), lambda: splits(_regression), "regression", senseless=PLAIN, fast=True),
    "binary": Entry(lambda: _mlp(1), lambda: splits(_binary), "binary", senseless=PLAIN),
    "multi_label": Entry(lambda: _mlp(CLASSES), lambda: splits(_multi_label), "multi_label", senseless=PLAIN),
    "graph": Entry(Graph, lambda: splits(_graphs), senseless=PLAIN),
    "mlp": Entry(lambda: _mlp(CLASSES), vectors(10), senseless=PLAIN),
    "small_cnn": Entry(
        lambda: nn.Sequential(_double(3, 8), nn.MaxPool2d(2), _double(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(16, CLASSES)),
        images(16), senseless=PLAIN,
    ),
}  # fmt: skip
