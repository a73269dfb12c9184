"""A small convolutional net for 8×8 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


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


def digits_cnn(channels: Sequence[int] = (32, 64, 64), classes: int = 10) -> nn.Module:
    """``(samples, 1, 8, 8) -> (samples, classes)``; 56,394 parameters at the default width."""
    return DigitsCNN(channels, classes)
