"""What a task is: what a batch holds, which of a model's answers count, what is explained, measured and lowered."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Batch, Inputs, Labels, answers, described, named
from prunekit.errors import PrunekitError, UsageError, nearest, quoted
from prunekit.measure.measure import Measure
from prunekit.task.losses import Loss, as_loss

LABEL_KEYS = ("labels", "label")
Target = Callable[[Tensor, Labels], Tensor]
"""``(outputs (samples, ...), labels) -> (samples, targets)``; each row depends on its own sample only."""


class Task:
    """Everything that prunekit knows of what a model is for. A task of one's own is a subclass that says what is other.

    Attributes:
        name: as recipes have it.
        target: what is explained when nothing else is asked for.
        measures: against labels; the first one decides every choice.
        closeness: against another model's outputs, the first one first; ``labels`` of these is ``(its outputs, labels)``.
        loss: what training lowers.
        output: which of a model's answers counts: a key or a place, where it returns several.
        measured_in_place: measures take outputs on the model's device, some samples at a time; else all of a batch on the CPU.
    """

    name = "task"
    measured_in_place = False
    target = "outputs"
    measures: tuple[Measure, ...] = ()
    closeness: tuple[Measure, ...] = ()

    def __init__(self, loss: Any = None, output: str | int | None = None) -> None:
        self.loss: Loss = self.default_loss() if loss is None else self._given(loss)
        self.output = output

    def default_loss(self) -> Loss:
        """The loss of a task whose user names none."""

        def refuse(outputs: Tensor, labels: Labels) -> Tensor:
            raise UsageError(f"task {self.name}: has no loss of its own; name one (loss: my_module:loss)")

        return Loss(refuse, refuse, name="none")

    def with_loss(self, loss: Any, name: str | None = None) -> Task:
        """The same task with another loss."""
        other = copy.copy(self)
        other.loss = other._given(loss, name)
        return other

    def _given(self, loss: Any, name: str | None = None) -> Loss:
        """The user's loss as this task calls it."""
        return as_loss(loss, name)

    def measured_on(self, bytes_per_token: float | None) -> tuple[Measure, ...]:
        """``measures`` on samples whose texts have so many bytes a token, where that is known."""
        return self.measures

    @property
    def choosing(self) -> tuple[Measure, ...]:
        """What one model is better than another by, in this order: the first measure, then closeness to the dense model."""
        return *self.measures[:1], *self.closeness

    # -- what comes in and out ---------------------------------------------------------------------------------

    def batch(self, given: Any) -> Batch:
        """The pair ``(inputs, labels)`` of what a loader gives: a pair, a mapping with ``labels``, or inputs alone.

        Raises:
            UsageError: it is none of these.
        """
        if isinstance(given, Mapping):
            key = next((k for k in LABEL_KEYS if k in given), None)
            return {k: v for k, v in given.items() if k != key}, None if key is None else given[key]
        if isinstance(given, tuple | list):
            if len(given) == 2:
                return given[0], given[1]
            if len(given) == 1:
                return given[0], None
            raise UsageError(
                f"a batch has {len(given)} parts; it must be (inputs, labels), with inputs a tuple where the model takes "
                "several, or a mapping of the model's arguments with labels among them"
            )
        return given, None

    def outputs(self, answer: Any) -> Tensor:
        """The one tensor ``(samples, ...)`` of a model's answer that counts.

        Raises:
            UsageError: there are several, and none is named; lists them.
        """
        if self.output is not None:
            found = _picked(answer, self.output)
            if not isinstance(found, Tensor):
                raise UsageError(f"task.output is {self.output!r}, but the model returned {_said(answer)}")
            return found
        if isinstance(answer, Tensor):
            return answer
        logits = _picked(answer, "logits")
        if isinstance(logits, Tensor):
            return logits
        floats = [t for t in answers(answer) if t.is_floating_point()]
        if len(floats) != 1:
            raise UsageError(
                f"the model returned {_said(answer)}; name the one that counts (task: {{name: {self.name}, output: …}})"
            )
        return floats[0]

    def check(self, outputs: Tensor, labels: Labels, where: str) -> None:
        """Refuses outputs and labels that do not fit each other; a summary of what is expected is in the message."""

    def check_loss(self, outputs: Tensor, labels: Labels, where: str) -> None:
        """Refuses a loss of the user's that cannot mean what it says, on a few samples."""

    def cause(self, what: str, outputs: Tensor, labels: Labels, error: Exception) -> PrunekitError:
        """Why ``what`` failed with ``error``: outputs and labels that do not fit each other, or else its own words."""
        try:
            self.check(outputs, labels, "samples")
        except PrunekitError as found:
            return found
        except Exception as other:  # inside torch.func no value can be looked at
            error = error or other
        return UsageError(f"{what} fails on outputs {described(outputs)} and labels {described(labels)}: {quoted(error)}")

    # -- what is explained and lowered -------------------------------------------------------------------------

    def targets(self) -> Mapping[str, Target]:
        """Name -> target. ``loss`` is each sample's own."""
        return {"outputs": flat, "loss": self.single_loss}

    def get_target(self, target: str | Target) -> Target:
        """Looks a target up by name; a function ``(outputs, labels) -> (samples, targets)`` is taken as it is.

        Raises:
            UsageError: the task has none of that name; lists those that it has.
        """
        if callable(target):
            return target
        known = self.targets()
        if target not in known:
            hint = nearest(target, list(known)) if target not in TARGET_NAMES else f"it has {', '.join(known)}"
            raise UsageError(f"target {target!r} does not exist for the task {self.name}; {hint}")
        return known[target]

    def single_loss(self, outputs: Tensor, labels: Labels) -> Tensor:
        """Each sample's loss before its factor in the batch's: ``(samples, 1)``."""
        return self.loss.of_each(outputs, labels)[:, None]

    def reference(self, outputs: Tensor) -> Tensor:
        """What of another model's outputs ``divergence`` compares with."""
        return outputs

    def divergence(self, outputs: Tensor, labels: Labels) -> Tensor:
        """How far outputs are from a reference, per sample: ``(samples, 1)``. ``labels`` is ``(reference, labels)``.

        Here: the squared distance, the mean over a sample's outputs.
        """
        found: Tensor = (outputs - labels[0]).square().reshape(len(outputs), -1).mean(1, keepdim=True)
        return found

    def curved(self, outputs: Tensor, labels: Labels, direction: Tensor) -> Tensor:
        """``H u``: the second derivative of a sample's ``divergence`` in its outputs, times ``direction``, at the outputs."""
        return 2 * direction / max(1, direction[0].numel())

    def drawn(self, outputs: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
        """A random ``u`` of the outputs' shape with ``E[u uᵀ] = H``."""
        signs = torch.randint(2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        return signs * math.sqrt(2 / max(1, outputs[0].numel()))

    def importance(self) -> str:
        """The target whose gradients say how much a kept unit matters while a mask is repaired."""
        return "margin" if "margin" in self.targets() else "loss" if self.measures else "outputs"

    def classes(self, labels: Labels) -> Tensor | None:
        """One class a sample ``(samples,)``, where there is one."""
        return None

    def facts(self) -> dict[str, Any]:
        """What of the task decides scores and figures, for provenance; empty for plain classification."""
        return {"name": self.name, **({} if self.output is None else {"output": self.output})}

    @property
    def deciding(self) -> Measure:
        """The measure that decides choices: the first against labels, or else of closeness to the dense model."""
        return (*self.measures, *self.closeness)[0]


TARGET_NAMES = ("outputs", "log_prob", "margin", "loss")
"""Every target that some task has."""


def flat(outputs: Tensor, labels: Labels) -> Tensor:
    """Every output, of every place: ``(samples, outputs)``."""
    return outputs.reshape(len(outputs), -1)


def _picked(answer: Any, key: str | int) -> Any:
    try:
        if isinstance(key, int) or isinstance(answer, Mapping):
            return answer[key]
    except (LookupError, TypeError):
        return None
    return getattr(answer, key, None)


def _said(answer: Any) -> str:
    if isinstance(answer, Mapping | tuple | list):
        return f"{type(answer).__name__} of {described(answer)}" if named(answer) else f"an empty {type(answer).__name__}"
    found = answers(answer)
    return f"{type(answer).__name__} of {described(found)}" if found else f"{type(answer).__name__}, which holds no tensor"


__all__ = ["TARGET_NAMES", "Inputs", "Target", "Task", "flat"]
