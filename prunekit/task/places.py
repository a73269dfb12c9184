"""A class at every place of a sample: segmentation, tagging, language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Batch, Labels
from prunekit.errors import UsageError
from prunekit.measure.measure import Measure, ratio
from prunekit.task.classification import Classification
from prunekit.task.losses import CROSS_ENTROPY
from prunekit.task.task import Target


class Places(Classification):
    """A class at every place of a sample; single figures of a sample are means over its places that count."""

    places = True
    summed: tuple[str, ...] = ()
    """Targets that are sums over places; the others are means."""

    def targets(self) -> Mapping[str, Target]:
        return {"log_prob": self.mean_log_prob, "margin": self.mean_margin, "loss": self.own_loss}

    target = "margin"

    def _mean(self, values: Tensor, labels: Labels) -> Tensor:
        if labels.is_floating_point():
            return values.mean(1, keepdim=True)
        counted: Tensor = (labels != self.ignore_index).flatten(1).sum(1, keepdim=True)
        return values.sum(1, keepdim=True) / counted.clamp_min(1)

    def at_places(self, target: str) -> Target | None:
        """One value a place, ``(samples, places)``, of which a target is the sum by ``place_shares``; None where it is none."""
        plain = self.loss.path == CROSS_ENTROPY and self.class_weights is None and not self.label_smoothing
        if target == "margin":
            return self.margin
        return self.log_prob if target == "log_prob" or (target == "loss" and plain) else None

    def place_shares(self, target: str, labels: Labels) -> Tensor:
        """Weights ``(samples, places)`` of the sum that a target is over ``at_places``."""
        counted = (labels != self.ignore_index).flatten(1).to(torch.get_default_dtype())
        shares: Tensor = counted if target in self.summed else counted / counted.sum(1, keepdim=True).clamp_min(1)
        return -shares if target == "loss" else shares

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
        bytes_per_token: of the text, for bits a byte; without it the measure is bits a token.
    """

    target = "log_prob"
    summed = ("log_prob",)
    measured_in_place = True

    def __init__(
        self, loss: Any = None, output: str | int | None = None, *, bytes_per_token: float | None = None, **options: Any
    ) -> None:
        super().__init__(loss, output, class_axis=-1, **options)
        self.bytes_per_token = bytes_per_token
        if bytes_per_token is not None and not (isinstance(bytes_per_token, int | float) and bytes_per_token > 0):
            raise UsageError(f"task.bytes_per_token is {bytes_per_token}; it must be above 0")
        accuracy = self.measures[0]
        self.measures = (
            Measure("perplexity", self._surprise, _perplexity, better="lower"),
            self._bits(bytes_per_token),
            accuracy,
        )

    def _bits(self, bytes_per_token: float | None) -> Measure:
        name, bits = "bits_per_token" if bytes_per_token is None else "bits_per_byte", 0.6931471805599453 * (bytes_per_token or 1)
        return Measure(name, self._surprise, lambda s, n: ratio(s, n) / bits, better="lower")

    def measured_on(self, bytes_per_token: float | None) -> tuple[Measure, ...]:
        """Bits a byte are of the samples' own bytes, where a token's bytes differ from split to split."""
        if bytes_per_token is None or self.bytes_per_token is None:
            return self.measures
        return tuple(self._bits(bytes_per_token) if one.name == "bits_per_byte" else one for one in self.measures)

    def targets(self) -> Mapping[str, Target]:
        return {**super().targets(), "log_prob": self.sum_log_prob}

    def sum_log_prob(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The sum over tokens of the true one's log-probability: ``(samples, 1)``."""
        return self.log_prob(outputs, labels).sum(1, keepdim=True)

    def _surprise(self, outputs: Tensor, labels: Labels) -> Tensor:
        counted = (labels != self.ignore_index).flatten(1).sum(1)
        if outputs.dtype in (torch.bfloat16, torch.float16):  # whose probabilities would have two or three digits
            outputs = outputs.float()
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


def _perplexity(sums: Tensor, samples: int) -> Tensor:
    return ratio(sums, samples).exp()


def _mean_overlap(sums: Tensor, samples: int) -> Tensor:
    """Intersection over union, the mean over classes that occur."""
    both, found, true = sums.unflatten(-1, (3, -1)).unbind(-2)
    union = found + true - both
    iou: Tensor = torch.where(union > 0, both / union.clamp_min(1), torch.zeros_like(union))
    mean: Tensor = iou.sum(-1) / (union > 0).sum(-1).clamp_min(1)
    return mean
