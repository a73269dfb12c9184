"""Numbers: outputs and labels of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.batch import Labels
from prunekit.errors import UsageError
from prunekit.measure.measure import Measure
from prunekit.task.figures import Figures
from prunekit.task.losses import Loss
from prunekit.task.task import Target, flat


class Regression(Figures):
    """Numbers as labels, of the outputs' shape (an axis of 1 apart): ``(samples, …)``."""

    name = "regression"

    def __init__(self, loss: Any = None, output: str | int | None = None) -> None:
        super().__init__(loss, output)
        self.measures = (
            Measure("rmse", self._errors, _root, better="lower"),
            Measure("r2", self._moments, _explained),
        )
        self.closeness = (Measure("distance", lambda out, both: _errors(out, both[0]), _root, better="lower"),)

    def default_loss(self) -> Loss:
        def batch(outputs: Tensor, labels: Labels) -> Tensor:
            return F.mse_loss(outputs, _like(outputs, labels))

        def single(outputs: Tensor, labels: Labels) -> Tensor:
            return (outputs - _like(outputs, labels)).square().reshape(len(outputs), -1).mean(1)

        return Loss(
            batch, single, lambda labels: torch.ones(len(labels), device=labels.device), "mse", "torch.nn.functional:mse_loss"
        )

    def check(self, outputs: Tensor, labels: Labels, where: str) -> None:
        if not isinstance(labels, Tensor) or labels.numel() != outputs.numel() or len(labels) != len(outputs):
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise UsageError(
                f"data: labels of the {where} are {shape}, outputs {tuple(outputs.shape)}; regression needs a number an output"
            )
        if labels.is_floating_point() and not bool(labels.isfinite().all()):
            raise UsageError(f"data: labels of the {where} hold NaN or Inf")

    def targets(self) -> Mapping[str, Target]:
        return {"outputs": flat, "log_prob": self.log_prob, "loss": self.single_loss}

    def log_prob(self, outputs: Tensor, labels: Labels) -> Tensor:
        """``-½ Σ error²``, a normal distribution's log-density at unit variance up to a constant: ``(samples, 1)``."""
        errors = (outputs - _like(outputs, labels)).square().reshape(len(outputs), -1)
        return -0.5 * errors.sum(1, keepdim=True)

    def importance(self) -> str:
        return "outputs"

    def _errors(self, outputs: Tensor, labels: Labels) -> Tensor:
        return _errors(outputs, _like(outputs, labels))

    def _moments(self, outputs: Tensor, labels: Labels) -> Tensor:
        """Squared error, label, and label squared, by output: ``(samples, 3 × outputs)``."""
        y = _like(outputs, labels).reshape(len(outputs), -1).double()
        error = (outputs.reshape(len(outputs), -1).double() - y).square()
        return torch.cat([error, y, y.square()], 1)


def _like(outputs: Tensor, labels: Labels) -> Tensor:
    found: Tensor = labels.to(outputs.dtype).reshape(outputs.shape)
    return found


def _errors(outputs: Tensor, other: Tensor) -> Tensor:
    """Sum of a sample's squared errors, and how many numbers it has."""
    rows = (outputs.double() - other.double()).square().reshape(len(outputs), -1)
    return torch.stack([rows.sum(1), torch.full_like(rows[:, 0], rows.shape[1])], 1)


def _root(sums: Tensor, samples: int) -> Tensor:
    return (sums[..., 0] / sums[..., 1].clamp_min(1)).sqrt()


def _explained(sums: Tensor, samples: int) -> Tensor:
    """``1 - Σ error² / Σ (label - its mean)²`` over all outputs; labels that do not vary: 1 if there is no error, else 0."""
    error, y, square = sums.unflatten(-1, (3, -1)).unbind(-2)
    spread = (square - y.square() / samples).sum(-1)
    varies = spread > 1e-12 * square.sum(-1)
    left = error.sum(-1)
    return torch.where(varies, 1 - left / spread.clamp_min(1e-300), (left == 0).double())
