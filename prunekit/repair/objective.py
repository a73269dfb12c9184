"""What a repair lowers: a divergence from the dense model, learnt from some samples and accepted on others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Inputs, Labels, to
from prunekit.data import Samples, drawn, learn_and_accept
from prunekit.data.sharing import mixes
from prunekit.errors import PrunekitError, UsageError, nearest
from prunekit.kernel import ModelFunction, mean_value
from prunekit.kernel.gradients import MomentEngine, choose_engine
from prunekit.repair.deadline import Deadline
from prunekit.task import Target, Task
from prunekit.task.evaluation import run
from prunekit.task.referenced import Budget, KeptBatches, Referenced
from prunekit.trajectory import Layout
from prunekit.trajectory.layout import fixed_state

OBJECTIVES = ("kl", "loss")
STREAMED = (*OBJECTIVES, "hidden")


@dataclass(frozen=True)
class Objective:
    """``J(θ)``, a mean over samples, to be lowered.

    Of several ranks each has its stretch of every batch, and sums over samples are those of all; where the model mixes a batch's
    samples, each has them all.

    Attributes:
        function: the model with J's own target.
        theta: the dense weights, ``(P,)``.
        learn, accept: disjoint parts of the samples, with what ``function`` takes as labels.
        labelled: the part to learn from with its true labels.
        ranking: the model with the target whose gradients say how important a kept unit is.
    """

    function: ModelFunction
    theta: Tensor
    learn: KeptBatches
    accept: KeptBatches
    labelled: KeptBatches
    ranking: ModelFunction

    def watched(self, deadline: Deadline) -> Objective:
        """The same, left when time is over, by ``OutOfTime``."""
        for batches in (self.learn, self.accept, self.labelled):
            if batches.dealt:
                batches.before = deadline.look
        return replace(self, function=deadline.watched(self.function), ranking=deadline.watched(self.ranking))

    def engine(self) -> MomentEngine:
        """The one for ``ranking``'s gradients, chosen on the same samples by all ranks: as many as a batch of each has."""
        first = self.labelled.source.groups[0]
        some = first[: -(-len(first) // ranks.size())] if self.labelled.dealt else first
        return choose_engine(self.ranking, self.theta, *to(self.labelled.source.fetch(some), self.labelled.device))

    def on_learn(self, factors: Tensor) -> float:
        return mean_value(self.function, self.theta * factors, self.learn)

    def on_accept(self, factors: Tensor) -> float:
        return mean_value(self.function, self.theta * factors, self.accept)


def make_objective(
    model: nn.Module,
    batches: Any,
    target: str | Target,
    ranking: str | Target,
    *,
    task: Task,
    accept: Any = None,
    accept_share: float = 0.25,
    seed: int = 0,
    reference: nn.Module | None = None,
) -> Objective:
    """Splits the samples and runs the dense model once.

    Args:
        target: ``"kl"`` (the task's divergence from the dense model's outputs; of labels only which places count is looked at),
            ``"loss"`` on the labels, or a function ``(outputs, labels) -> (samples, targets)`` whose sum over targets is lowered.
        ranking: a target that the task has, or a function.
        accept: samples that masks are accepted on; None takes ``accept_share`` of ``batches``, in (0, 1), for that.
        reference: whose outputs are to be stayed close to; None for those of ``model`` itself.

    Raises:
        UsageError: unknown target, a share out of range, no samples for one of the parts, or a reference of other tensors.
        PrunekitError: J is not finite for the dense model.
    """
    if isinstance(target, str) and target not in OBJECTIVES:
        raise UsageError(f"refine: target {target!r} does not exist; {nearest(target, list(OBJECTIVES))}, or a function")
    if not 0 < accept_share < 1:
        raise UsageError(f"refine: the share of samples to accept on is {accept_share}; it must be above 0 and below 1")
    device = next(model.parameters()).device
    layout = Layout.of(model)
    fixed = fixed_state(model, layout)
    theta = _flat(model, layout)
    close_to = theta if reference is None else _flat(reference, layout).to(device)
    given = Samples.of(batches, task.batch)
    parts = learn_and_accept(
        given, None if accept is None else Samples.of(accept, task.batch), drawn(given, accept_share, seed), "refine"
    )
    budget = Budget()
    dealt = ranks.size() > 1 and not mixes(lambda batch: run(model, batch, task), parts[0])
    learn, judged = (KeptBatches(part, device, budget, dealt) for part in parts)

    def function_of(wanted: str | Target) -> ModelFunction:
        return ModelFunction(model, layout, fixed, wanted, device, task=task)

    if target == "kl":
        reference_of = _reference(function_of(_as_they_are), close_to, task)
        close, judged = Referenced(learn, reference_of), Referenced(judged, reference_of)
        made = Objective(function_of(task.divergence), theta, close, judged, learn, function_of(ranking))
    else:
        made = Objective(function_of(target), theta, learn, judged, learn, function_of(ranking))
    at_dense = made.on_learn(torch.ones_like(theta))
    if not torch.tensor(at_dense).isfinite():
        raise PrunekitError(f"refine: the target is {at_dense} for the dense model")
    return made


def _as_they_are(outputs: Tensor, labels: Labels) -> Tensor:
    return outputs.reshape(len(outputs), -1)


def _reference(function: ModelFunction, theta: Tensor, task: Task) -> Any:
    """``(inputs, labels) -> reference`` of the model at ``theta``, of the shape of its outputs."""
    found: list[Tensor] = []

    def note(outputs: Tensor, labels: Labels) -> Tensor:
        found.append(task.reference(outputs))
        return _as_they_are(outputs, labels)

    function.target = note

    def reference(x: Inputs, y: Labels) -> Tensor:
        function(theta, x, y)
        return found.pop()

    return reference


def _flat(model: nn.Module, layout: Layout) -> Tensor:
    if Layout.of(model) != layout:
        raise UsageError("refine: the reference's tensors are not those of the model")
    return layout.state(model)
