"""A batch's loss taken apart into its samples': ``batch = (1/n) Σ_k factor_k · single_k``.

A mean over samples has factors of 1. Class weights and ignored places give ``Σ w·l / Σ w``: single losses are ``w·l`` and every
factor is ``n / Σ w``. A loss that torch does not name is called with one sample at a time; its factors follow from its own
gradient, which for a loss of this form is parallel to the single losses' ones. A loss that mixes its batch is not of this form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.batch import Labels, described, take
from prunekit.errors import PrunekitError, UsageError, quoted

BatchLoss = Callable[[Tensor, Labels], Tensor]
"""``(outputs (samples, ...), labels) -> scalar``."""
Single = Callable[[Tensor, Labels], Tensor]
"""``(outputs, labels) -> (samples,)``; each row depends on its own sample only."""
CROSS_ENTROPY = "torch.nn.functional:cross_entropy"
ROUNDING = 1e-3  # relative; factors that differ by less are the same
IGNORED = -100


@dataclass(frozen=True)
class Loss:
    """A batch's loss and its samples'.

    Attributes:
        batch: what is trained on, called with a whole batch.
        single: each sample's share before its factor; None to call ``batch`` with one sample at a time.
        weights: ``labels -> (samples,)``, Σ of which the batch divides by; None where that is not known from labels alone.
        name: for messages.
        path: for files, ``module:name``.
    """

    batch: BatchLoss
    single: Single | None = None
    weights: Callable[[Labels], Tensor] | None = None
    name: str = "loss"
    path: str = ""

    def of_each(self, outputs: Tensor, labels: Labels) -> Tensor:
        """Single losses ``(samples,)``, before their factors."""
        if self.single is not None:
            return self.single(outputs, labels)
        if len(outputs) == 1:
            return self.batch(outputs, labels).reshape(1)
        rows = range(len(outputs))
        return torch.stack([self.batch(outputs[k : k + 1], take(labels, slice(k, k + 1), len(outputs))) for k in rows])

    def counted(self, labels: Labels, samples: int) -> float:
        """What a batch counts in the mean over several."""
        return float(samples) if self.weights is None else float(self.weights(labels).double().sum())

    def factors(self, outputs: Tensor, labels: Labels) -> Tensor:
        """``(samples,)`` with ``batch(outputs, labels) = mean(factor · single)``.

        Raises:
            UsageError: the loss mixes its batch.
        """
        samples = len(outputs)
        outputs = outputs.detach()
        if self.weights is not None:
            return self.known_factors(labels)
        if samples == 1:
            return outputs.new_ones(1)
        return self._from_gradients(outputs, labels)

    def known_factors(self, labels: Labels) -> Tensor:
        """``factors`` where they follow from labels alone: ``samples / Σ weights``, the same for every sample."""
        assert self.weights is not None
        found = self.weights(labels)
        return (len(found) / found.sum().clamp_min(1e-30)).expand(len(found))

    def _from_gradients(self, outputs: Tensor, labels: Labels) -> Tensor:
        samples = len(outputs)
        with torch.enable_grad():
            together = outputs.clone().requires_grad_()
            whole = self.batch(together, labels)
            if not whole.requires_grad:
                raise UsageError(f"loss: {self.name} does not depend on the model's outputs")
            found = torch.autograd.grad(whole, together, allow_unused=True)[0]
            alone = outputs.clone().requires_grad_()
            single = self.of_each(alone, labels)
            own = torch.autograd.grad(single[single.isfinite()].sum(), alone, allow_unused=True)[0]
        if found is None or own is None:
            raise UsageError(f"loss: {self.name} does not depend on the model's outputs")
        a, b = found.flatten(1).double(), own.flatten(1).double().nan_to_num(0, 0, 0)
        share = (a * b).sum(1) / b.square().sum(1).clamp_min(1e-300)
        off = (a - share[:, None] * b).norm(dim=1)
        scale = a.norm(dim=1).max().clamp_min(1e-300)
        value = float((share * single.detach().double().nan_to_num(0, 0, 0)).sum())
        settled = bool((a.norm(dim=1) == 0).all())  # nothing left to learn here: nothing tells the factors apart
        close = abs(value - float(whole.detach())) <= 10 * ROUNDING * (abs(float(whole.detach())) + 1e-6)
        if not settled and (bool((off > ROUNDING * scale).any()) or not close):
            raise UsageError(
                f"loss: {self.name} mixes the samples of a batch (it is no weighted mean of single losses), so single samples "
                "have no loss of their own; take a target other than the loss, or a criterion of whole batches (gradient, snip)"
            )
        factors = share * samples
        known = a.norm(dim=1) > 1e-6 * scale
        for constant in (1.0, float(samples)):  # a mean, a sum: without the rounding of their gradients
            if bool(((factors - constant).abs()[known] <= ROUNDING * constant).all()):
                return torch.full_like(factors, constant).to(outputs)
        return factors.to(outputs)


def as_loss(loss: Any, name: str | None = None) -> Loss:
    """A loss as ``Loss``: torch's cross-entropies by their options, any other ``(outputs, labels) -> scalar`` as it is."""
    if isinstance(loss, Loss):
        return loss
    called = name or getattr(loss, "__qualname__", None) or type(loss).__qualname__
    function, options = _options(loss)
    if function in (F.cross_entropy, F.nll_loss) and options is not None:
        single, weights = cross_entropy_parts(logits=function is F.cross_entropy, **options)
        known = weights if options.get("reduction", "mean") == "mean" else None
        return Loss(_watched(loss, called), single, known, called, _path(loss))
    return Loss(_watched(loss, called), name=called, path=_path(loss))


def _watched(loss: BatchLoss, name: str) -> BatchLoss:
    """The user's loss, refused by name where it fails or gives no single number."""

    def batch(outputs: Tensor, labels: Labels) -> Tensor:
        try:
            value = loss(outputs, labels)
        except PrunekitError:
            raise
        except Exception as error:  # the user's own loss
            raise UsageError(
                f"loss: {name} fails on outputs {described(outputs)} and labels {described(labels)}: {quoted(error)}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"loss: {name} must return one number as a tensor, returned {what}")
        return value.reshape(())

    return batch


def _path(loss: Any) -> str:
    return f"{getattr(loss, '__module__', '?')}:{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def _options(loss: Any) -> tuple[Any, dict[str, Any] | None]:
    """The torch function that a loss calls, and with which options; None where they are given by position."""
    if isinstance(loss, functools.partial):
        function, options = _options(loss.func)
        return function, None if loss.args or options is None else {**options, **loss.keywords}
    if isinstance(loss, nn.CrossEntropyLoss):
        return F.cross_entropy, {
            "weight": loss.weight, "ignore_index": loss.ignore_index, "reduction": loss.reduction,
            "label_smoothing": loss.label_smoothing,
        }  # fmt: skip
    if isinstance(loss, nn.NLLLoss):
        return F.nll_loss, {"weight": loss.weight, "ignore_index": loss.ignore_index, "reduction": loss.reduction}
    return loss, {}


def cross_entropy_parts(
    weight: Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    axis: int = 1,
    logits: bool = True,
) -> tuple[Single, Callable[[Labels], Tensor]]:
    """Single losses ``w·l``, summed over a sample's places, and their weights ``w``, as torch's cross-entropy has them.

    Args:
        weight: of the classes ``(C,)``.
        axis: where classes lie.
        logits: whether outputs are logits, not log-probabilities.
    """

    def each(outputs: Tensor, labels: Tensor) -> Tensor:
        log_p = (F.log_softmax(outputs, axis) if logits else outputs).movedim(axis, -1)
        classes = None if weight is None else weight.to(log_p)
        if labels.is_floating_point():  # soft labels: torch divides by the number of places
            soft = labels.movedim(axis, -1)
            if label_smoothing:
                soft = soft * (1 - label_smoothing) + label_smoothing / soft.shape[-1]
            return -(soft * log_p if classes is None else soft * log_p * classes).sum(-1)
        counted = labels != ignore_index
        index = labels.masked_fill(~counted, 0)[..., None]
        found = -log_p.gather(-1, index)[..., 0]
        if classes is not None:
            found = found * classes[index[..., 0]]
        if label_smoothing:
            smooth = -(log_p if classes is None else log_p * classes).sum(-1) / log_p.shape[-1]
            found = (1 - label_smoothing) * found + label_smoothing * smooth
        return found.masked_fill(~counted, 0)

    def single(outputs: Tensor, labels: Labels) -> Tensor:
        return _by_sample(each(outputs, labels))

    def weights(labels: Labels) -> Tensor:
        if labels.is_floating_point():
            return _by_sample(torch.ones_like(labels.movedim(axis, -1)[..., 0]))
        counted = labels != ignore_index
        if weight is None:
            return _by_sample(counted.float())
        return _by_sample(weight.to(labels.device)[labels.masked_fill(~counted, 0)] * counted)

    return single, weights


def _by_sample(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).sum(1)
