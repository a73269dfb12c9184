"""Scores by which units stay, and one step of learning them, tensor by tensor.

A score a unit; the best stay, and the gradient with respect to the mask goes straight to the scores (edge-popup: Ramanujan et
al., arXiv 1911.13299), or through a soft mask around the level at which units stay. A score is moved by Adam (arXiv 1412.6980),
whose second moments may be kept as one number a row and one a column (Adafactor: Shazeer and Stern, arXiv 1804.04235, without its
other changes) and whose first in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Inputs, Labels
from prunekit.repair.exchange import Exchange
from prunekit.repair.live import Live, Use
from prunekit.repair.swaps import Swaps
from prunekit.repair.weights import Weights

NORMAL = (math.pi / 2 - 1) ** 0.5  # standard deviation over mean of |x| for normal x
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Learner:
    """Scores ``(U,)``, and what their optimizer remembers.

    Args:
        swaps: the pattern, whose number of units stays in every step.
        live: the model that gives gradients.
        worth: where scores start, ``(U,)``, 0 or more, on any scale: it is divided by its standard deviation, or by what that
            would be for normal values of the same mean if that is more (sizes of channels differ so little that their
            deviation would put kept and removed ones out of each other's reach). It is changed in place.
        lean: factored second moments and first ones in bfloat16, where units are single weights: 6 bytes a weight, scores
            included, in the place of 12. For other units one second moment for all: divided by its own, the gradient of a unit,
            which keeps its sign, says no more than that sign, and none changes places.
    """

    def __init__(self, swaps: Swaps, live: Live, worth: Tensor, lean: bool = False) -> None:
        self.swaps, self.live = swaps, live
        scale = torch.maximum(worth.std(correction=0), NORMAL * worth.mean()).clamp_min(1e-30)
        self.scores = worth.div_(scale)
        self.steps = 0
        self._states: dict[str, Adam | LeanAdam | _OneSize] = {}
        self._scratch = Scratch()
        if swaps.spans is None:
            self._states[""] = _OneSize(self.scores) if lean else Adam(self.scores)
        for name in swaps.spans or ():
            part = swaps.factor(name, self.scores)
            self._states[name] = LeanAdam(part, self._scratch) if lean else Adam(part)

    def step(
        self, batches: Sequence[tuple[Inputs, Labels]], samples: int, rate: float, t: float = 1.0, heat: float = 0.0
    ) -> float:
        """Moves the scores once; returns the mean of the live model's target where the gradient was taken.

        Of several ranks each has its own part of the samples, none perhaps, and gets its part of the mean; the gradient is that
        of all, and scores move alike.

        Args:
            samples: in the ``batches`` of all ranks.
            rate: Adam's.
            t: where on the segment from the dense model to the pruned one the gradient is taken, in (0, 1].
            heat: above 0 masks are soft, ``σ((score - level) / heat)`` around the level from
                which units stay, and the gradient goes through it; 0 for a hard mask and a gradient straight through.
        """
        self.steps += 1
        if heat and isinstance(self.swaps, Weights):
            return self._soft_step(batches, samples, rate, self.swaps.levels(self.scores), heat)
        units, slope = self._units(t, heat)
        self.live.scale(lambda name: self.swaps.factor(name, units))
        if self.swaps.spans is not None:
            return summed(self.live, batches, samples, lambda name, gradient: self._move(name, gradient, rate))
        total = torch.zeros_like(self.scores)

        def add(name: str, gradient: Tensor | None) -> None:
            if gradient is not None:
                self.swaps.add(name, gradient * self.live.dense[name], units, total)

        found = self.live.backward(batches, samples, add)
        ranks.add_up([total])
        total = self.swaps.per_weight(total)  # units of several kinds compete by what they do for a weight
        self._states[""].move(self.scores, total if slope is None else total * slope, rate, self.steps)
        return found

    def _units(self, t: float, heat: float) -> tuple[Tensor, Tensor | None]:
        """Factors ``(U,)``, and their derivative by the scores where they are soft."""
        if heat:
            soft = ((self.scores - self.swaps.level(self.scores)) / heat).sigmoid_()
            return soft, soft * (1 - soft) / heat
        kept = self.swaps.select(self.scores)
        return kept if t == 1 else torch.where(kept, self.scores.new_ones(()), self.scores.new_full((), 1 - t)), None

    def _soft_step(
        self,
        batches: Sequence[tuple[Inputs, Labels]],
        samples: int,
        rate: float,
        levels: Callable[[str], Tensor],
        heat: float,
    ) -> float:
        """A step of soft masks, which are computed tensor by tensor, forward and again backward, and never held."""

        def soft(name: str) -> Tensor:
            score = self.swaps.factor(name, self.scores)
            return torch.sub(score, levels(name), out=self._scratch.like(score)).div_(heat).sigmoid_()

        def move(name: str, gradient: Tensor | None) -> None:
            if gradient is not None:
                mask = soft(name)
                gradient = gradient.to(mask)
                gradient.mul_(mask).addcmul_(gradient, mask, value=-1).div_(heat)
            self._move(name, gradient, rate)

        self.live.scale(soft)
        return summed(self.live, batches, samples, move)

    @torch.no_grad()
    def _move(self, name: str, gradient: Tensor | None, rate: float) -> None:
        score = self.swaps.factor(name, self.scores)  # a view
        found = torch.zeros_like(score) if gradient is None else gradient.to(score).mul_(self.live.dense[name])
        self._states[name].move(score, found, rate, self.steps)

    def masks(self) -> Tensor:
        """What stays by the scores now, ``(U,)`` boolean."""
        return self.swaps.select(self.scores)

    def bytes(self) -> int:
        """Of scores and the optimizer's memory; what a single tensor takes for a moment aside, its gradient and two such."""
        return self.scores.nbytes + sum(state.bytes() for state in self._states.values())


class Scratch:
    """Memory that is written over and over: on a CPU new pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def like(self, tensor: Tensor, number: int = 0) -> Tensor:
        """A tensor of the same shape, device and kind whose content is anybody's; it is good until the next of its number."""
        held = self._held.get(number)
        if held is None or held.numel() < tensor.numel() or (held.dtype, held.device) != (tensor.dtype, tensor.device):
            self._held[number] = held = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return held[: tensor.numel()].view(tensor.shape)


class Adam:
    """Adam of one tensor."""

    def __init__(self, like: Tensor) -> None:
        self._first, self._second = torch.zeros_like(like), torch.zeros_like(like)

    def move(self, score: Tensor, gradient: Tensor, rate: float, step: int) -> None:
        """``score -= rate * m / (sqrt(v) + ε)``, in place, bias corrected."""
        first, second = BETAS
        self._first.lerp_(gradient, 1 - first)
        self._second.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (self._second / (1 - second**step)).sqrt_().add_(EPSILON)
        score.addcdiv_(self._first, size, value=-rate / (1 - first**step))

    def bytes(self) -> int:
        return self._first.nbytes + self._second.nbytes


class LeanAdam:
    """The same, in two bytes a score and two numbers a row and column of the tensor."""

    def __init__(self, like: Tensor, scratch: Scratch) -> None:
        self._first = torch.zeros_like(like, dtype=torch.bfloat16)
        table = _table(like)
        self._rows, self._columns = like.new_zeros(len(table)), like.new_zeros(table.shape[1])
        self._scratch = scratch

    def move(self, score: Tensor, gradient: Tensor, rate: float, step: int) -> None:
        first, second = BETAS
        table = _table(gradient)
        square = torch.mul(table, table, out=self._scratch.like(table))
        self._rows.lerp_(square.mean(1), 1 - second)
        self._columns.lerp_(square.mean(0), 1 - second)
        momentum = self._scratch.like(gradient, 1).copy_(self._first).lerp_(gradient, 1 - first)
        self._first.copy_(momentum)
        corrected = (1 - second**step) * self._rows.mean().clamp_min(1e-30)
        size = torch.outer((self._rows / corrected).sqrt_(), self._columns.sqrt(), out=square).add_(EPSILON)
        score.addcdiv_(momentum, size.view(score.shape), value=-rate / (1 - first**step))

    def bytes(self) -> int:
        return self._first.nbytes + self._rows.nbytes + self._columns.nbytes


class _OneSize:
    """The same with one second moment for all."""

    def __init__(self, like: Tensor) -> None:
        self._first, self._second = torch.zeros_like(like), like.new_zeros(())

    def move(self, score: Tensor, gradient: Tensor, rate: float, step: int) -> None:
        first, second = BETAS
        self._first.lerp_(gradient, 1 - first)
        self._second.lerp_(gradient.square().mean(), 1 - second)
        size = (self._second / (1 - second**step)).sqrt_().add_(torch.finfo(gradient.dtype).tiny)
        score.sub_(self._first / size, alpha=rate / (1 - first**step))

    def bytes(self) -> int:
        return self._first.nbytes + self._second.nbytes


def _table(tensor: Tensor) -> Tensor:
    """``(first axis, the others)``; a vector is one row."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def summed(live: Live, batches: Sequence[tuple[Inputs, Labels]], samples: int, use: Use) -> float:
    """``Live.backward`` whose gradients are those of all ranks' batches; the mean that is returned is this rank's part."""
    exchange = Exchange({name: live.dense[name] for name in reversed(live.scaled)}, use)
    found = live.backward(batches, samples, exchange.give)
    with torch.no_grad():
        exchange.finish()
    return found


@dataclass
class FisherSum:
    """``Σ_b (θ · mean gradient of batch b)²`` of every unit, ``(U,)``: Fisher's diagonal by whole batches, no sample alone.

    Attributes:
        total: the sum so far.
        batches: how many.
    """

    swaps: Swaps
    live: Live
    total: Tensor
    batches: int = 0

    def add(self, batch: Sequence[tuple[Inputs, Labels]], samples: int) -> None:
        """Adds a batch's; the model is looked at as ``live`` is scaled.

        Args:
            batch: this rank's part of it, none or one.
            samples: in all of it.
        """
        spans = self.swaps.spans
        once = None if spans is not None else torch.zeros_like(self.total)
        whole = torch.ones((), dtype=self.total.dtype, device=self.total.device).expand(len(self.total))

        def use(name: str, gradient: Tensor | None) -> None:
            if gradient is None:
                return
            signed = gradient.mul_(self.live.dense[name])
            if spans is not None:
                self.total[spans[name]] += signed.flatten().square_()
            else:
                assert once is not None
                self.swaps.add(name, signed, whole, once)

        if once is None:
            summed(self.live, batch, samples, use)
        else:
            self.live.backward(batch, samples, use)
            ranks.add_up([once])
            self.total += once.square_()
        self.batches += 1
