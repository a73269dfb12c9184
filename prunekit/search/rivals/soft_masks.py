"""Soft masks learnt by a model's divergence from itself, batch by batch of a stream: what learnt rivals have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from prunekit.batch import Batch, size, to
from prunekit.errors import NonFiniteError
from prunekit.kernel import ModelFunction
from prunekit.progress import Bar
from prunekit.repair.live import Live
from prunekit.repair.stream import Stream
from prunekit.task import Task
from prunekit.task.evaluation import run
from prunekit.trajectory import Layout
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.layout import fixed_state


class Relaxation(Protocol):
    """Masks that follow from logits and a draw.

    Attributes:
        logits: by the weight's name.
    """

    logits: dict[str, Tensor]

    def draw(self, t: float) -> Mapping[str, Tensor]:
        """Masks of the weights' shapes, drawn anew; ``t`` is the share of the steps that is over, in [0, 1)."""

    def use(self, name: str, slope: Tensor) -> None:
        """Sets a weight's logits' gradient from that of its mask, which is of the weight's shape and may be changed."""


class SoftMasks:
    """A model that runs with soft masks, beside the dense one, which it is to stay close to.

    Args:
        model: dense, on the device that computes; it is left as it is.
        names: of the weights that have masks.
        stream: every step takes one batch.
    """

    def __init__(self, model: nn.Module, names: list[str], stream: Stream, task: Task) -> None:
        self._model, self._stream, self._task = model, stream, task
        layout = Layout.of(model)
        self.device = next(model.parameters()).device
        function = ModelFunction(model, layout, fixed_state(model, layout), task.divergence, self.device, task=task)
        held = named_tensors(model)
        self._live = Live(function, {entry.name: held[entry.name].detach() for entry in layout}, names)

    def dense(self, name: str) -> Tensor:
        """The dense weight."""
        return self._live.dense[name]

    def learn(
        self,
        relaxed: Relaxation,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[float], float],
        steps: int,
        what: str,
        clip: float = math.inf,
    ) -> None:
        """Moves the logits ``steps`` times.

        Args:
            optimizer: of the logits.
            rate: its rate, of the share of the steps that is over.
            what: learns, for messages.
            clip: the most that the norm of all gradients may be.

        Raises:
            NonFiniteError: the divergence is NaN or Inf.
        """
        with Bar(what, steps) as bar:
            for step, batch in enumerate(islice(self._batches(), steps)):
                t = step / steps
                self.slopes(relaxed.draw(t), batch, relaxed.use)
                if clip < math.inf:
                    torch.nn.utils.clip_grad_norm_(relaxed.logits.values(), clip)
                optimizer.param_groups[0]["lr"] = rate(t)
                optimizer.step()
                bar.advance()

    def slopes(self, masks: Mapping[str, Tensor], batch: Batch, use: Callable[[str, Tensor], None]) -> float:
        """The mean divergence over a batch's samples; ``use`` gets its gradient with respect to every mask, one at a time.

        Args:
            batch: with the dense model's reference beside its labels.

        Raises:
            NonFiniteError: it is NaN or Inf.
        """
        self._live.scale(lambda name: masks[name])

        def chained(name: str, gradient: Tensor | None) -> None:
            dense = self.dense(name)
            use(name, torch.zeros_like(dense) if gradient is None else gradient.mul_(dense))

        found = self._live.backward([batch], size(batch[0]), chained)
        if not math.isfinite(found):
            raise NonFiniteError(f"the divergence from the dense model is {found} while masks are learnt; lower rate")
        return found

    def _batches(self) -> Iterator[Batch]:
        for batch in self._stream:
            x, y = to(batch, self.device)
            with torch.no_grad(), self._live.running():
                reference = self._task.reference(run(self._model, (x, y), self._task))
            yield x, (reference, y)
