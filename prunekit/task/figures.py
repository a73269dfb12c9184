"""Outputs and labels that are one number each: what regression and yes-or-no tasks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from prunekit.batch import Labels, take
from prunekit.errors import UsageError
from prunekit.task.losses import Loss, as_loss
from prunekit.task.task import Task

TRIED = 8  # samples on which a loss of the user's is taken apart


class Figures(Task):
    """One number as label for every output. A model may answer ``(samples,)``; its outputs are ``(samples, 1)`` here.

    The user's loss gets outputs in the shape in which the model gives them, as in the user's own loop.
    """

    _bare = False  # whether the model answers (samples,)

    def outputs(self, answer: Any) -> Tensor:
        found = super().outputs(answer)
        self._bare = found.dim() == 1
        return found[:, None] if self._bare else found

    def _given(self, loss: Any, name: str | None = None) -> Loss:
        given = as_loss(loss, name)
        return replace(given, batch=lambda outputs, labels: given.batch(self._shaped(outputs), labels))

    def _shaped(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0] if self._bare else outputs

    def check_loss(self, outputs: Tensor, labels: Labels, where: str) -> None:
        """Outputs ``(n, 1)`` and labels ``(n,)`` make ``(n, n)`` differences in torch's losses.

        Raises:
            UsageError: labels have another shape than the outputs, and the loss compares every output with every label.
        """
        shaped = self._shaped(outputs)
        if labels.shape == shaped.shape or len(outputs) < 2:
            return
        few = slice(0, TRIED)
        try:
            self.loss.factors(outputs[few], take(labels, few, len(outputs)))
        except UsageError as error:
            if "mixes the samples" not in str(error):
                raise
            raise UsageError(
                f"loss: {self.loss.name} compares every output with every label, as the model's outputs are "
                f"{tuple(shaped.shape)} and labels of the {where} {tuple(labels.shape)}; give both one shape"
            ) from error
