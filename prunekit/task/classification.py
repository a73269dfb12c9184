"""One class a sample, or classes at places that are explained one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.batch import Labels
from prunekit.errors import UsageError
from prunekit.measure.classes import kl_each
from prunekit.measure.measure import Measure, ratio
from prunekit.task.losses import CROSS_ENTROPY, IGNORED, Loss, cross_entropy_parts
from prunekit.task.task import Target, Task, flat


class Classification(Task):
    """One class a sample: outputs ``(samples, classes)``, labels ``(samples,)`` int64, or soft labels of the outputs' shape.

    Outputs with more axes are classes at places (positions, pixels): labels then have the outputs' shape without the axis of
    classes. Places whose label is ``ignore_index`` do not count.

    Args:
        loss: mean loss ``(outputs, labels) -> scalar``; cross-entropy when None.
        class_axis: of outputs with places; by the labels' shape when None.
        class_weights: of the default loss, one number a class.
        label_smoothing: of the default loss, in [0, 1).
        ignore_index: label of places that do not count.
    """

    name = "classification"
    places = False

    def __init__(
        self,
        loss: Any = None,
        output: str | int | None = None,
        *,
        class_axis: int | None = None,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORED,
    ) -> None:
        self.class_axis, self.label_smoothing, self.ignore_index = class_axis, label_smoothing, ignore_index
        self.class_weights = None if class_weights is None else _weights(class_weights)
        if class_axis not in (None, 1, -1):
            raise UsageError(f"task.class_axis is {class_axis}; classes lie on axis 1 or -1")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise UsageError(f"task.ignore_index is {ignore_index!r}; it must be a whole number")
        if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 1:
            raise UsageError(f"task.label_smoothing is {label_smoothing}; it must be from 0 to below 1")
        if loss is not None and (class_weights is not None or label_smoothing):
            raise UsageError(
                "task.class_weights and task.label_smoothing are of the default loss; put them into the loss you name"
            )
        super().__init__(loss, output)
        self.measures = (Measure("accuracy", self._right, _share, unit="%"),)
        self.closeness = (
            Measure("agreement", self._agreeing, _share, unit="%"),
            Measure("kl", self._kl, _divided, better="lower", unit="nats"),
        )

    def default_loss(self) -> Loss:
        weight = None if self.class_weights is None else torch.tensor(self.class_weights)
        single, _ = cross_entropy_parts(weight, self.ignore_index, self.label_smoothing, axis=-1)
        soft_axis = self.class_axis or (1 if self.places else -1)
        _, weights = cross_entropy_parts(weight, self.ignore_index, self.label_smoothing, axis=soft_axis)

        def batch(outputs: Tensor, labels: Labels) -> Tensor:
            index = labels if not labels.is_floating_point() else labels.movedim(self._axis(outputs, labels), -1)
            last = self._last(outputs, labels).movedim(-1, 1)
            soft = index.movedim(-1, 1) if index.is_floating_point() else index
            return F.cross_entropy(
                last, soft, None if weight is None else weight.to(last), ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )  # fmt: skip

        return Loss(
            batch,
            lambda outputs, labels: single(self._last(outputs, labels), self._soft_last(outputs, labels)),
            weights,
            "cross_entropy",
            CROSS_ENTROPY,
        )

    # -- shapes ------------------------------------------------------------------------------------------------

    def _axis(self, outputs: Tensor, labels: Labels) -> int:
        """Where classes lie.

        Raises:
            UsageError: labels fit neither axis, or both, and the task does not say.
        """
        if outputs.dim() == 2:
            return 1
        if self.class_axis is not None:
            return self.class_axis
        shape = tuple(labels.shape)
        if labels.is_floating_point() and shape == tuple(outputs.shape):
            return 1 if self.places else -1
        first, last = tuple(outputs.shape[:1] + outputs.shape[2:]), tuple(outputs.shape[:-1])
        if first == last == shape:
            raise UsageError(
                f"outputs {tuple(outputs.shape)} have as many places as classes; say where classes lie "
                f"(task: {{name: {self.name}, class_axis: 1}}, or -1)"
            )
        if shape == last:
            return -1
        if shape == first:
            return 1
        raise UsageError(
            f"labels {shape} of {labels.dtype} do not fit outputs {tuple(outputs.shape)}: they must be {last} (classes on the "
            f"last axis) or {first} (classes on axis 1)"
        )

    def _last(self, outputs: Tensor, labels: Labels) -> Tensor:
        """Outputs with classes on the last axis."""
        return outputs if outputs.dim() == 2 else outputs.movedim(self._axis(outputs, labels), -1)

    def _soft_last(self, outputs: Tensor, labels: Labels) -> Tensor:
        soft = labels.is_floating_point() and labels.dim() > 2
        found: Tensor = labels.movedim(self._axis(outputs, labels), -1) if soft else labels
        return found

    def _index(self, outputs: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Class of every place, and which places count."""
        if labels.is_floating_point():
            index = self._soft_last(outputs, labels).argmax(-1)
            return index, torch.ones_like(index, dtype=torch.bool)
        counted: Tensor = labels != self.ignore_index
        index = labels.masked_fill(~counted, 0)
        return index, counted

    def check(self, outputs: Tensor, labels: Labels, where: str) -> None:
        if outputs.dim() < 2:
            raise UsageError(
                f"model: outputs of the {where} are {tuple(outputs.shape)}; the task {self.name} needs (samples, classes)"
            )
        if self.places and outputs.dim() < 3:
            raise UsageError(
                f"model: outputs of the {where} are {tuple(outputs.shape)}; the task {self.name} needs classes at every place of "
                "a sample, three axes or more"
            )
        if not isinstance(labels, Tensor):
            raise UsageError(f"data: labels of the {where} are {type(labels).__name__}; the task {self.name} needs class indices")
        if labels.is_floating_point():
            if labels.shape != outputs.shape:
                raise UsageError(
                    f"data: labels of the {where} are {_of(labels)}, which are no classes; class indices are int64, soft labels "
                    f"have the outputs' shape {tuple(outputs.shape)}; for numbers name the task (task: regression)"
                )
            sums = labels.sum(1 if self.places else -1)
            if bool((labels < 0).any()) or not bool(((sums - 1).abs() <= 1e-3).all()):
                raise UsageError(
                    f"data: labels of the {where} are {labels.dtype} of the outputs' shape and no shares of classes that sum "
                    "to 1; name the task (task: multi_label, binary or regression)"
                )
            return
        if labels.dtype != torch.int64:
            raise UsageError(f"data: labels of the {where} are {_of(labels)}; cross_entropy needs class indices, int64")
        if outputs.dim() == 2 and labels.shape != outputs.shape[:1]:
            raise UsageError(
                f"data: labels of the {where} are {_of(labels)}; outputs {tuple(outputs.shape)} need one class index a sample, "
                "int64"
            )
        last = self._last(outputs, labels)
        if labels.shape != last.shape[:-1]:
            raise UsageError(
                f"data: labels of the {where} are {_of(labels)}; outputs {tuple(outputs.shape)} with classes on axis "
                f"{self._axis(outputs, labels)} need a class index a place, {tuple(last.shape[:-1])} int64"
            )
        classes = last.shape[-1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UsageError(f"task.class_weights has {len(self.class_weights)} numbers, the model has {classes} outputs")
        inside = labels[labels != self.ignore_index]
        if len(inside) and (int(inside.min()) < 0 or int(inside.max()) >= classes):
            raise UsageError(
                f"data: labels of the {where} go from {int(inside.min())} to {int(inside.max())}, the model has {classes} outputs"
            )

    def classes(self, labels: Labels) -> Tensor | None:
        one = isinstance(labels, Tensor) and labels.dim() == 1 and labels.dtype == torch.int64
        return labels if one else None

    # -- targets -----------------------------------------------------------------------------------------------

    def targets(self) -> Mapping[str, Target]:
        return {"outputs": flat, "log_prob": self.log_prob, "margin": self.margin, "loss": self.own_loss}

    def log_prob(self, outputs: Tensor, labels: Labels) -> Tensor:
        """Log-probability of the true class: ``(samples, 1)``, or one a place (0 where a place does not count)."""
        index, counted = self._index(outputs, labels)
        found = F.log_softmax(self._last(outputs, labels), -1).gather(-1, index[..., None])[..., 0]
        return found.masked_fill(~counted, 0).reshape(len(outputs), -1)

    def margin(self, outputs: Tensor, labels: Labels) -> Tensor:
        """True class's logit minus the largest other one: ``(samples, 1)``, or one a place (0 where it does not count)."""
        index, counted = self._index(outputs, labels)
        last = self._last(outputs, labels)
        true = last.gather(-1, index[..., None])[..., 0]
        others = last.scatter(-1, index[..., None], float("-inf"))
        return (true - others.amax(-1)).masked_fill(~counted, 0).reshape(len(outputs), -1)

    def own_loss(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The loss of each sample alone, the mean over its places: ``(samples, 1)``."""
        found = self.loss.of_each(outputs, labels)[:, None]
        if self.loss.weights is None or outputs.dim() == 2:
            return found
        return found / self.loss.weights(labels)[:, None].clamp_min(1e-30)

    def reference(self, outputs: Tensor) -> Tensor:
        """Log-probabilities."""
        axis = -1 if outputs.dim() == 2 or (self.class_axis is None and not self.places) else self.class_axis or 1
        return F.log_softmax(outputs, axis)

    def divergence(self, outputs: Tensor, labels: Labels) -> Tensor:
        """KL(reference ‖ model) per sample in nats, the mean over places that count: ``(samples, 1)``."""
        return self.divergence_by(_kl, outputs, labels)

    def divergence_by(self, kl: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Labels) -> Tensor:
        """The same by another way to KL: ``(log-probabilities, outputs)`` with classes last -> one number a place."""
        reference: Tensor
        reference, true = labels
        axis = self._kl_axis(outputs)
        found = kl(reference.movedim(axis, -1), outputs.movedim(axis, -1))
        if outputs.dim() == 2 or true is None or true.is_floating_point():
            return found.reshape(len(outputs), -1).mean(1, keepdim=True)
        counted: Tensor = (true != self.ignore_index).to(found)
        return ((found * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1))[:, None]

    def curved(self, outputs: Tensor, labels: Labels, direction: Tensor) -> Tensor:
        axis = self._kl_axis(outputs)
        p, u = F.softmax(outputs, axis).movedim(axis, -1), direction.movedim(axis, -1)
        found: Tensor = p * (u - (p * u).sum(-1, keepdim=True))
        return (found * self._place_shares(p, labels[1])).movedim(-1, axis)

    def drawn(self, outputs: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
        axis = self._kl_axis(outputs)
        p = F.softmax(outputs, axis).movedim(axis, -1)
        chosen = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).view(p.shape[:-1]).to(p.device)
        found = F.one_hot(chosen, p.shape[-1]) - p
        return (found * self._place_shares(p, labels[1]) ** 0.5).movedim(-1, axis)

    def _place_shares(self, p: Tensor, labels: Labels) -> Tensor | float:
        """What a place counts in its sample's divergence, to be multiplied with ``p``'s shape."""
        if p.dim() == 2:
            return 1.0
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return 1 / p[0, ..., 0].numel()
        counted = (labels != self.ignore_index).to(p)
        each = counted.flatten(1).sum(1).clamp_min(1).view(-1, *[1] * (counted.dim() - 1))
        return (counted / each)[..., None]

    def _kl_axis(self, outputs: Tensor) -> int:
        if outputs.dim() == 2:
            return -1
        if self.class_axis is not None:
            return self.class_axis
        return 1 if self.places else -1

    # -- measures ----------------------------------------------------------------------------------------------

    def _right(self, outputs: Tensor, labels: Labels) -> Tensor:
        index, counted = self._index(outputs, labels)
        right = (self._last(outputs, labels).argmax(-1) == index) & counted
        return _by_sample(right, counted)

    def _agreeing(self, outputs: Tensor, labels: Labels) -> Tensor:
        reference, true = labels
        axis, counted = self._where(outputs, true)
        return _by_sample((outputs.argmax(axis) == reference.argmax(axis)) & counted, counted)

    def _kl(self, outputs: Tensor, labels: Labels) -> Tensor:
        reference, true = labels
        axis, counted = self._where(outputs, true)
        return _by_sample(kl_each(outputs.movedim(axis, -1), reference.movedim(axis, -1)) * counted, counted)

    def _where(self, outputs: Tensor, labels: Labels) -> tuple[int, Tensor]:
        axis = self._axis(outputs, labels) if isinstance(labels, Tensor) else self._kl_axis(outputs)
        places = outputs.movedim(axis, -1).shape[:-1]
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            counted: Tensor = labels != self.ignore_index
            return axis, counted
        return axis, torch.ones(places, dtype=torch.bool, device=outputs.device)

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        for key, usual in (("class_axis", None), ("class_weights", None), ("label_smoothing", 0.0), ("ignore_index", IGNORED)):
            value = getattr(self, key)
            if value != usual:
                found[key] = list(value) if isinstance(value, tuple) else value
        return {} if found == {"name": "classification"} else found


def _kl(reference: Tensor, outputs: Tensor) -> Tensor:
    """KL along the last axis; what the reference rules out (a log-probability of -inf) adds nothing."""
    out_of_it = reference == -torch.inf
    found = F.log_softmax(outputs, -1).masked_fill(out_of_it, 0)
    return (reference.exp() * (reference.masked_fill(out_of_it, 0) - found)).sum(-1)


def _weights(given: Any) -> tuple[float, ...]:
    numbers = isinstance(given, Sequence | Tensor) and not isinstance(given, str)
    found = [float(w) if isinstance(w, int | float | Tensor) else math.nan for w in given] if numbers else []
    if not found or not all(0 <= w < math.inf for w in found) or not sum(found):
        raise UsageError(f"task.class_weights is {given!r}; it must be a list of numbers from 0 up, one a class")
    return tuple(found)


def _of(labels: Tensor) -> str:
    return f"{labels.dtype} {tuple(labels.shape)}"


def _by_sample(right: Tensor, counted: Tensor) -> Tensor:
    """``(samples, 2)``: the sum over places, and how many count."""
    samples = len(right)
    return torch.stack([right.reshape(samples, -1).double().sum(1), counted.reshape(samples, -1).double().sum(1)], 1)


def _share(sums: Tensor, samples: int) -> Tensor:
    """A share of what counts, rounded to float32 as torch's mean of zeros and ones is."""
    return ratio(sums, samples).float()


def _divided(sums: Tensor, samples: int) -> Tensor:
    return ratio(sums, samples)
