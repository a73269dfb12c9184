"""One class a sample, or one a place: classification, segmentation, tagging, language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.batch import Batch, Labels
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
        self.class_weights = None if class_weights is None else tuple(class_weights)
        if class_axis not in (None, 1, -1):
            raise UsageError(f"task.class_axis is {class_axis}; classes lie on axis 1 or -1")
        if not 0 <= label_smoothing < 1:
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
        if not isinstance(labels, Tensor):
            raise UsageError(f"data: labels of the {where} are {type(labels).__name__}; the task {self.name} needs class indices")
        if labels.is_floating_point():
            if labels.shape != outputs.shape:
                raise UsageError(
                    f"data: labels of the {where} are {_of(labels)}, which are no classes; class indices are int64, soft labels "
                    f"have the outputs' shape {tuple(outputs.shape)}; for numbers name the task (task: regression)"
                )
            if bool((labels < 0).any()) or not torch.allclose(labels.sum(1 if self.places else -1), torch.ones(()), atol=1e-3):
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
        classes = self._last(outputs, labels).shape[-1]
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
        reference: Tensor
        reference, true = labels
        axis = self._kl_axis(outputs)
        reference, last = reference.movedim(axis, -1), outputs.movedim(axis, -1)
        out_of_it = reference == -torch.inf
        found = F.log_softmax(last, -1).masked_fill(out_of_it, 0)
        kl = (reference.exp() * (reference.masked_fill(out_of_it, 0) - found)).sum(-1)
        if outputs.dim() == 2 or true is None or true.is_floating_point():
            return kl.reshape(len(outputs), -1).mean(1, keepdim=True)
        counted = (true != self.ignore_index).to(kl)
        return ((kl * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1))[:, None]

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


class Places(Classification):
    """A class at every place of a sample; single figures of a sample are means over its places that count."""

    places = True

    def targets(self) -> Mapping[str, Target]:
        return {"log_prob": self.mean_log_prob, "margin": self.mean_margin, "loss": self.own_loss}

    target = "margin"

    def _mean(self, values: Tensor, labels: Labels) -> Tensor:
        if labels.is_floating_point():
            return values.mean(1, keepdim=True)
        counted = (labels != self.ignore_index).flatten(1).sum(1, keepdim=True)
        return values.sum(1, keepdim=True) / counted.clamp_min(1)

    def mean_log_prob(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The mean over places of the true class's log-probability: ``(samples, 1)``."""
        return self._mean(self.log_prob(outputs, labels), labels)

    def mean_margin(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The mean over places of the margin: ``(samples, 1)``."""
        return self._mean(self.margin(outputs, labels), labels)


class Segmentation(Places):
    """A class at every pixel: outputs ``(samples, classes, …)``, labels ``(samples, …)``."""

    name = "segmentation"

    def __init__(self, loss: Any = None, output: str | int | None = None, *, class_axis: int | None = 1, **options: Any) -> None:
        super().__init__(loss, output, class_axis=class_axis, **options)
        accuracy = self.measures[0]
        self.measures = (Measure("miou", self._overlaps, _mean_overlap, unit="%"), accuracy)

    def _overlaps(self, outputs: Tensor, labels: Labels) -> Tensor:
        """By class: places of both, of the prediction, and of the label: ``(samples, 3 × classes)``."""
        index, counted = self._index(outputs, labels)
        last = self._last(outputs, labels)
        classes = last.shape[-1]
        found = last.argmax(-1).flatten(1)
        index, counted = index.flatten(1), counted.flatten(1)
        rows = torch.zeros(len(outputs), 3, classes + 1, dtype=torch.float64, device=outputs.device)
        out = torch.full_like(index, classes)
        for part, where in enumerate(
            (
                torch.where(counted & (found == index), index, out),
                torch.where(counted, found, out),
                torch.where(counted, index, out),
            )
        ):
            rows[:, part].scatter_add_(1, where, torch.ones_like(where, dtype=torch.float64))
        return rows[..., :classes].flatten(1)


class TokenClassification(Places):
    """A class for every token: outputs ``(samples, tokens, classes)``, labels ``(samples, tokens)``, -100 where none counts."""

    name = "token_classification"

    def __init__(self, loss: Any = None, output: str | int | None = None, *, class_axis: int | None = -1, **options: Any) -> None:
        super().__init__(loss, output, class_axis=class_axis, **options)


class LanguageModel(Places):
    """The next, the masked, or the answer's tokens: outputs ``(samples, tokens, vocabulary)``.

    ``log_prob`` is the sum over a sample's tokens, margin and loss their mean.

    Args:
        bytes_per_token: of the text, for bits a byte; without it bits a token are told.
    """

    target = "log_prob"

    def __init__(
        self, loss: Any = None, output: str | int | None = None, *, bytes_per_token: float | None = None, **options: Any
    ) -> None:
        super().__init__(loss, output, class_axis=-1, **options)
        self.bytes_per_token = bytes_per_token
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise UsageError(f"task.bytes_per_token is {bytes_per_token}; it must be above 0")
        bits = "bits_per_token" if bytes_per_token is None else "bits_per_byte"
        accuracy = self.measures[0]
        self.measures = (
            Measure("perplexity", self._surprise, _perplexity, better="lower"),
            Measure(
                bits, self._surprise, lambda s, n: ratio(s, n) / (0.6931471805599453 * (bytes_per_token or 1)), better="lower"
            ),
            accuracy,
        )

    def targets(self) -> Mapping[str, Target]:
        return {**super().targets(), "log_prob": self.sum_log_prob}

    def sum_log_prob(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The sum over tokens of the true one's log-probability: ``(samples, 1)``."""
        return self.log_prob(outputs, labels).sum(1, keepdim=True)

    def _surprise(self, outputs: Tensor, labels: Labels) -> Tensor:
        counted = (labels != self.ignore_index).flatten(1).sum(1)
        return torch.stack([-self.log_prob(outputs, labels).double().sum(1), counted.double()], 1)

    def facts(self) -> dict[str, Any]:
        more = {} if self.bytes_per_token is None else {"bytes_per_token": self.bytes_per_token}
        return {**super().facts(), **more}


class CausalLM(LanguageModel):
    """Every next token. Labels are compared with the outputs one place before; -100 and padding do not count.

    A mapping's ``labels`` are the tokens themselves, as transformers has them, and by default its ``input_ids``. Of a pair
    ``(tokens, labels)`` labels may be the tokens or, as they are cut from a text, the tokens one place on: which, is seen from
    them.
    """

    name = "causal_lm"

    def batch(self, given: Any) -> Batch:
        inputs, labels = super().batch(given)
        if isinstance(inputs, Mapping):
            tokens = inputs.get("input_ids")
            if labels is None:
                if not isinstance(tokens, Tensor):
                    raise UsageError("task causal_lm: a batch has neither labels nor input_ids to make them of")
                mask = inputs.get("attention_mask")
                labels = tokens if mask is None or mask.dim() != 2 else tokens.masked_fill(mask == 0, self.ignore_index)
            return inputs, self._shifted(labels)
        if labels is None:
            return inputs, self._shifted(inputs)
        if not isinstance(inputs, Tensor) or labels.shape != inputs.shape:
            raise UsageError(
                "task causal_lm: a pair must be (tokens, labels) of one shape, or a batch a mapping of the model's arguments"
            )
        ignored = labels == self.ignore_index
        if bool(((labels == inputs) | ignored).all()):
            return inputs, self._shifted(labels)
        if bool(((labels[:, :-1] == inputs[:, 1:]) | ignored[:, :-1]).all()):
            return inputs, labels
        raise UsageError("task causal_lm: labels are neither the tokens nor the tokens one place on (-100 apart)")

    def _shifted(self, labels: Tensor) -> Tensor:
        end = torch.full_like(labels[:, :1], self.ignore_index)
        return torch.cat([labels[:, 1:], end], 1)


class MaskedLM(LanguageModel):
    """Masked tokens: labels are -100 where a token is not asked for."""

    name = "masked_lm"


class Seq2SeqLM(LanguageModel):
    """The answer's tokens, given its earlier ones. ``labels`` of a mapping go to the model as well, which makes its decoder's

    inputs of them, as transformers' models do."""

    name = "seq2seq"

    def batch(self, given: Any) -> Batch:
        inputs, labels = super().batch(given)
        if isinstance(inputs, Mapping) and labels is not None and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "labels": labels}
        return inputs, labels


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


def _perplexity(sums: Tensor, samples: int) -> Tensor:
    return ratio(sums, samples).exp()


def _mean_overlap(sums: Tensor, samples: int) -> Tensor:
    """Intersection over union, the mean over classes that occur."""
    both, found, true = sums.unflatten(-1, (3, -1)).unbind(-2)
    union = found + true - both
    iou = torch.where(union > 0, both / union.clamp_min(1), torch.zeros_like(union))
    return iou.sum(-1) / (union > 0).sum(-1).clamp_min(1)
