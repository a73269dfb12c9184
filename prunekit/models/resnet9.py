"""ResNet-9 for 32×32 images, without BatchNorm and biases: the paper's convolutional net (ExPLAIND, arXiv 2505.20076)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3×3 convolutions, a ReLU after each, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv2(F.relu(self.conv1(x))))


class ResNet9(nn.Module):
    """Eight convolutions, two pairs of them residual, the maximum over the image, a linear classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, 2 * width, 5, stride=2, padding=2, bias=False)
        self.residual1 = Residual(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.residual2 = Residual(4 * width)
        self.conv4 = nn.Conv2d(4 * width, 2 * width, 3, bias=False)
        self.classifier = nn.Linear(2 * width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(F.relu(self.conv2(F.relu(self.conv1(x)))))
        x = self.residual2(F.max_pool2d(F.relu(self.conv3(x)), 2))
        x = F.adaptive_max_pool2d(F.relu(self.conv4(x)), 1)
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def resnet9(width: int = 64, classes: int = 2) -> nn.Module:
    """``(samples, 3, 32, 32) -> (samples, classes)``; 2,271,168 parameters at the default size."""
    return ResNet9(width, classes)
