"""Models whose answers no table of tasks has: raw heads with the user's own loss, and models without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Labels, answers
from prunekit.errors import UsageError
from prunekit.measure.measure import Measure
from prunekit.task.losses import BatchLoss, Loss, as_loss
from prunekit.task.regression import _errors, _root
from prunekit.task.task import Target, Task, _picked, _said, flat


class Unlabelled(Task):
    """No labels: choices are made by the distance to the dense model's outputs, and gradients of the outputs are explained."""

    name = "unlabelled"

    def __init__(self, loss: Any = None, output: str | int | None = None) -> None:
        super().__init__(loss, output)
        self.closeness = (Measure("divergence", lambda out, both: _errors(out, both[0]), _root, better="lower"),)

    def targets(self) -> Mapping[str, Target]:
        named = {} if self.loss.name == "none" else {"loss": self.single_loss}
        return {"outputs": flat, **named}

    def importance(self) -> str:
        return "outputs"


class Heads(Unlabelled):
    """Several outputs that count together: detection, a variational autoencoder, a multi-task model.

    Outputs are the named heads of every sample, one behind the other; the loss and the measures get them as a tuple again.

    Args:
        loss: mean loss ``(heads, labels) -> scalar``.
        heads: keys or places of the answer's tensors that count, each ``(samples, …)``; all floating ones when None.
        measures: functions ``(heads, labels) -> (samples,)`` by name, the first one decides; their means are shown.
        better: of the measures, ``higher`` or ``lower``.
    """

    name = "heads"

    def __init__(
        self,
        loss: Any = None,
        output: str | int | None = None,
        *,
        heads: Sequence[str | int] | None = None,
        measures: Mapping[str, Callable[[tuple[Tensor, ...], Labels], Tensor]] | None = None,
        better: str = "higher",
    ) -> None:
        if better not in ("higher", "lower"):
            raise UsageError(f"task.better is {better!r}; it must be higher or lower")
        self.heads = None if heads is None else tuple(heads)
        self._shapes: list[torch.Size] = []
        if isinstance(heads, str):
            raise UsageError(f"task.heads is {heads!r}; it must be a list of keys or places")
        super().__init__(loss, output)
        self.measures = tuple(
            Measure(name, self._rows(function), better="higher" if better == "higher" else "lower")
            for name, function in (measures or {}).items()
        )

    def _given(self, loss: Any, name: str | None = None) -> Loss:
        self.target = "loss"  # of every number of every head there may be thousands
        given = as_loss(loss, name)
        on_heads: BatchLoss = given.batch
        return Loss(
            lambda outputs, labels: on_heads(self.unpacked(outputs), labels),  # type: ignore[arg-type]
            name=given.name,
            path=given.path,
        )

    def _rows(self, function: Callable[[tuple[Tensor, ...], Labels], Tensor]) -> Callable[[Tensor, Labels], Tensor]:
        return lambda outputs, labels: function(self.unpacked(outputs), labels).double().reshape(len(outputs), 1)

    def outputs(self, answer: Any) -> Tensor:
        if self.heads is None:
            found = [t for t in answers(answer) if t.is_floating_point()]
        else:
            found = [_picked(answer, key) for key in self.heads]
        if not found or not all(isinstance(t, Tensor) for t in found):
            raise UsageError(f"task.heads is {list(self.heads or ())}, but the model returned {_said(answer)}")
        if len({len(t) for t in found}) > 1:
            raise UsageError(f"task.heads: {_said(answer)} have not one row a sample each")
        self._shapes[:] = [t.shape[1:] for t in found]  # in place: a copy with another loss shares them with its measures
        return torch.cat([t.reshape(len(t), -1) for t in found], 1)

    def unpacked(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """The heads that ``outputs`` were made of."""
        parts = outputs.split([shape.numel() for shape in self._shapes], 1)
        return tuple(part.reshape(len(outputs), *shape) for part, shape in zip(parts, self._shapes, strict=True))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), **({} if self.heads is None else {"heads": list(self.heads)})}
