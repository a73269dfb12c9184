"""Yes or no, once or for several labels: binary and multi-label classification by logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.batch import Labels
from prunekit.errors import UsageError
from prunekit.measure.measure import Measure, ratio
from prunekit.task.figures import Figures
from prunekit.task.losses import Loss
from prunekit.task.task import Target, flat


class MultiLabel(Figures):
    """Several labels a sample, each 0 or 1: outputs are logits ``(samples, labels)``, labels of their shape.

    Accuracy is the share of single labels that are right (a logit above 0 says yes).
    """

    name = "multi_label"

    def __init__(self, loss: Any = None, output: str | int | None = None) -> None:
        super().__init__(loss, output)
        self.measures = (
            Measure("accuracy", self._right, ratio, unit="%"),
            Measure("f1", self._hits, _f1, unit="%"),
        )
        self.closeness = (
            Measure("agreement", self._agreeing, ratio, unit="%"),
            Measure("kl", lambda out, both: self._kl(out, both[0]).double(), better="lower", unit="nats"),
        )

    def default_loss(self) -> Loss:
        def batch(outputs: Tensor, labels: Labels) -> Tensor:
            return F.binary_cross_entropy_with_logits(outputs, _like(outputs, labels))

        def single(outputs: Tensor, labels: Labels) -> Tensor:
            each = F.binary_cross_entropy_with_logits(outputs, _like(outputs, labels), reduction="none")
            return each.reshape(len(outputs), -1).mean(1)

        return Loss(
            batch,
            single,
            lambda labels: torch.ones(len(labels), device=labels.device),
            "binary_cross_entropy",
            "torch.nn.functional:binary_cross_entropy_with_logits",
        )

    def check(self, outputs: Tensor, labels: Labels, where: str) -> None:
        if not isinstance(labels, Tensor) or labels.numel() != outputs.numel() or len(labels) != len(outputs):
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise UsageError(
                f"data: labels of the {where} are {shape}, outputs {tuple(outputs.shape)}; the task {self.name} needs one label, "
                "0 or 1, an output"
            )
        if bool(((labels != 0) & (labels != 1)).any()):
            raise UsageError(f"data: labels of the {where} go from {float(labels.min()):g} to {float(labels.max()):g}; the task "
                             f"{self.name} needs 0 or 1")  # fmt: skip

    def targets(self) -> Mapping[str, Target]:
        return {"outputs": flat, "log_prob": self.log_prob, "margin": self.margin, "loss": self.single_loss}

    def log_prob(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The sum over labels of the true answer's log-probability: ``(samples, 1)``."""
        return F.logsigmoid(self._signed(outputs, labels)).sum(1, keepdim=True)

    def margin(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The least logit, signed so that a right answer's is above 0: ``(samples, 1)``."""
        return self._signed(outputs, labels).amin(1, keepdim=True)

    def _signed(self, outputs: Tensor, labels: Labels) -> Tensor:
        return (outputs * (2 * _like(outputs, labels) - 1)).reshape(len(outputs), -1)

    def divergence(self, outputs: Tensor, labels: Labels) -> Tensor:
        """``Σ KL`` of the Bernoulli distributions of all labels: ``(samples, 1)``, nats."""
        return self._kl(outputs, labels[0])

    def curved(self, outputs: Tensor, labels: Labels, direction: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p) * direction

    def drawn(self, outputs: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
        p = outputs.sigmoid()
        return torch.bernoulli(p.cpu(), generator=generator).to(p) - p

    def _kl(self, outputs: Tensor, reference: Tensor) -> Tensor:
        p = reference.sigmoid()
        yes = p * (F.logsigmoid(reference) - F.logsigmoid(outputs))
        no = (1 - p) * (F.logsigmoid(-reference) - F.logsigmoid(-outputs))
        return (yes + no).reshape(len(outputs), -1).sum(1, keepdim=True)

    def _right(self, outputs: Tensor, labels: Labels) -> Tensor:
        right = (outputs > 0) == (_like(outputs, labels) > 0.5)
        return _counted(right)

    def _agreeing(self, outputs: Tensor, labels: Labels) -> Tensor:
        return _counted((outputs > 0) == (labels[0] > 0))

    def _hits(self, outputs: Tensor, labels: Labels) -> Tensor:
        said, true = (outputs > 0).reshape(len(outputs), -1), (_like(outputs, labels) > 0.5).reshape(len(outputs), -1)
        return torch.stack([(said & true).sum(1), (said & ~true).sum(1), (~said & true).sum(1)], 1).double()


class Binary(MultiLabel):
    """Yes or no: outputs are one logit a sample, ``(samples,)`` or ``(samples, 1)``, labels 0 or 1, integers or not."""

    name = "binary"

    def check(self, outputs: Tensor, labels: Labels, where: str) -> None:
        if outputs.numel() != len(outputs):
            raise UsageError(
                f"model: outputs of the {where} are {tuple(outputs.shape)}; the task binary needs one logit a sample "
                "(for two classes: task: classification)"
            )
        super().check(outputs, labels, where)

    def classes(self, labels: Labels) -> Tensor | None:
        found: Tensor = labels.reshape(len(labels)).long()
        return found


def _like(outputs: Tensor, labels: Labels) -> Tensor:
    found: Tensor = labels.to(outputs.dtype).reshape(outputs.shape)
    return found


def _counted(right: Tensor) -> Tensor:
    rows = right.reshape(len(right), -1)
    return torch.stack(
        [rows.double().sum(1), torch.full((len(rows),), float(rows.shape[1]), dtype=torch.float64).to(rows.device)], 1
    )


def _f1(sums: Tensor, samples: int) -> Tensor:
    hits, wrong, missed = sums.unbind(-1)
    return 2 * hits / (2 * hits + wrong + missed).clamp_min(1)
