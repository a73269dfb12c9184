"""What a criterion may look at, and the shape every criterion has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Batch, Inputs, Labels, described, named, size, to
from prunekit.criteria.scores import Scores
from prunekit.data import Samples
from prunekit.data.sharing import mixes, same_alone, sharing
from prunekit.errors import PrunekitError, UsageError
from prunekit.kernel import ModelFunction
from prunekit.kernel.attribution import MEMORY
from prunekit.structure import Mappings
from prunekit.task import Classification, Target, Task
from prunekit.task.evaluation import unfit
from prunekit.task.task import flat
from prunekit.trajectory import Layout, Trajectory


class Spread(Protocol):
    """A model whose weights are not in one place: a criterion sees it a part at a time.

    Attributes:
        model: whose modules take hooks.
        device: where it computes.
        half: whether the model that it stands for is in half precision, which it computes wider.
    """

    model: nn.Module
    device: torch.device
    half: bool

    def check(self) -> None:
        """Before hooks are there; raises UsageError where the model has no such parts."""
        ...

    def run(self) -> None:
        """Passes all scoring samples through the model once, without graphs; hooks see what goes into every module."""
        ...

    def answer(self, batch: Batch) -> Tensor:
        """The outputs of a batch."""
        ...

    def cut(self, samples: Samples) -> Samples:
        """The same samples, in batches that leave room."""
        ...

    def backward(
        self, samples: Samples, total: Callable[[Tensor, Labels, int], Tensor]
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Part and batch, and by parameter of that part the gradient of ``total(outputs, labels, batch)``; part by part."""
        ...


@dataclass(frozen=True)
class Evidence:
    """A trained model, its path, scoring samples, and how to look at them.

    Attributes:
        data: scoring samples; None where a run has none.
        task: what the model is for, its loss included.
        nodes, rule: quadrature of a piece of the path; one midpoint is the default for ranking weights.
        early: ``(steps, nodes)`` for the first steps, where Adam moves furthest; None for no difference.
        tolerance: instead, halve pieces until each interval's sum is within this much, per sample (fidelity).
        stride: kept states a piece.
        share: which part of a step counts, see ``prunekit.kernel.SHARES``.
        aggregation: how signed scores become an importance, see ``AGGREGATIONS``.
        phase: optimizer steps ``[begin, end)`` that count; None for all.
        at: the weights to score, flat ``(P,)``, where they are not the trajectory's last (a pruned model's, with zeros);
            what a path contributed is always about the path's own end.
        classes: outputs that the target ``outputs`` is restricted to; empty for all. The samples are the caller's to choose.
        memory: bytes for scores in work.
        kept: layers that lose nothing, whatever is cut: see ``prunekit.structure.kept_layers``.
        attention: attention and families that names do not give away, for criteria that score units of a structure; see
            ``prunekit.structure.structure.Mappings``.
        skip_unfit: weights that a criterion cannot score (Wanda's and OBS' without inputs) by magnitude instead of refusing.
        options: what the criterion's own name says, ``name(key=value)``; those that are fields here are set already.
        spread: how the model computes where it is not held whole; then ``function`` and what follows from it are not to be asked
            for, see ``Criterion.spreads``.
        partial: where finished chunks are kept until all are done; ``partial_key``: what they are made from.
    """

    trajectory: Trajectory
    model: nn.Module
    prunable: tuple[str, ...]
    data: Samples | None = None
    task: Task = field(default_factory=Classification)
    target: str | Target = "outputs"
    seed: int = 0
    nodes: int = 1
    rule: str = "midpoint"
    early: tuple[int, int] | None = None
    tolerance: float | None = None
    stride: int = 1
    share: str = "kernel"
    aggregation: str = "l1"
    phase: tuple[int, int] | None = None
    at: Tensor | None = None
    classes: tuple[int, ...] = ()
    memory: int = MEMORY
    kept: tuple[str, ...] = ()
    attention: Mappings = ()
    skip_unfit: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    partial: Path | None = None
    partial_key: dict[str, Any] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    spread: Spread | None = None

    @property
    def layout(self) -> Layout:
        return self.trajectory.layout

    @property
    def state(self) -> Tensor:
        """The weights to score, flat ``(P,)``: the trained ones, or ``at``."""
        return self.trajectory.state(-1) if self.at is None else self.at

    def weights(self) -> dict[str, Tensor]:
        """The weights to score by name."""
        return self.layout.views(self.state)

    def samples(self) -> Samples:
        """Scoring samples ``(inputs, labels)``, batch by batch.

        Raises:
            PrunekitError: none were given.
        """
        if self.data is None:
            raise PrunekitError(
                "gradients need scoring samples, and this run has no data: import the model again "
                "with --data my_module:data --overwrite"
            )
        return self.data

    def function(self, target: str | Target | None = None) -> ModelFunction:
        """The model with ``target`` (the evidence's own by default) as a function of its weights."""
        wanted = self.task.get_target(self.target if target is None else target)
        if (self.target if target is None else target) == "outputs" and self.classes:
            wanted = _only(self.classes, wanted)
        return ModelFunction(self.model, self.layout, self.trajectory.fixed, wanted, self.device, task=self.task)

    @property
    def half(self) -> bool:
        """Whether the model is in half precision."""
        if self.spread is not None:
            return self.spread.half
        return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.model.parameters())

    def passing(self) -> tuple[nn.Module, torch.device, Callable[[Samples], None]]:
        """The model at the weights to score, where it computes, and what passes samples of ``shared`` through it."""
        if (spread := self.spread) is not None:
            spread.check()
            return spread.model, spread.device, lambda samples: spread.run()
        function = self.function(flat)
        theta = self.state.to(function.device)

        @torch.no_grad()
        def run(samples: Samples) -> None:
            for x, y in samples:
                function(theta, to(x, function.device), to(y, function.device))

        return function.model, function.device, run

    def check(self) -> None:
        """Whether model, samples, task and loss fit each other: everything is run once.

        Raises:
            UsageError: names the piece and what it does.
        """
        samples = iter(self.samples())
        depends = False
        for number, (inputs, labels) in enumerate(samples):
            outputs = self._answer(inputs, labels)
            depends = depends or outputs.requires_grad
            outputs = outputs.detach()
            if outputs.dim() < 1 or len(outputs) != size(inputs):
                raise UsageError(
                    f"model: outputs are {tuple(outputs.shape)} for inputs {described(inputs)}; samples must be on their first "
                    "axis"
                )
            labels = to(labels, outputs.device)
            self.task.check(outputs, labels, "scoring samples")
            if number == 0:
                self.task.check_loss(outputs, labels, "scoring samples")
        if not depends:
            raise UsageError(
                "model: its outputs do not depend on its weights as far as autograd sees; is its forward under no_grad, or does "
                "it detach them?"
            )

    def _answer(self, inputs: Inputs, labels: Labels) -> Tensor:
        """The outputs that count of a batch, with their graph."""
        kept: list[Tensor] = []

        def note(out: Tensor, labels: Labels) -> Tensor:
            kept.append(out)
            return out.reshape(max(1, len(out) if out.dim() else 1), -1)

        function = self.function(note)
        inputs = to(inputs, function.device)
        try:
            with function.at(self.state.to(function.device)):
                function.here(inputs, labels)
        except PrunekitError:
            raise
        except Exception as error:  # the user's own model and data
            raise unfit(type(self.model).__name__, inputs, error) from error
        return kept[0]

    def check_inputs(self) -> None:
        """Raises UsageError where scoring samples hold NaN; names the input and the batch."""
        for number, (inputs, _) in enumerate(self.data or ()):
            for name, tensor in named(inputs, "inputs").items():
                if tensor.is_floating_point() and bool(tensor.isnan().any()):
                    raise UsageError(f"data: {name} of the scoring samples hold NaN (batch {number}); leave such samples out")

    def _check_alone(self, answer: Callable[[Batch], Tensor], samples: Samples) -> None:
        """Raises UsageError where a sample alone does not give what it gives in its batch."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UsageError(
                    f"{name} ({type(module).__name__}) keeps no running statistics, so what a sample gives depends on the others "
                    "of its batch and no sample can be scored alone; train it with track_running_stats=True, or use a criterion "
                    "of whole batches or of weights (gradient, magnitude)"
                )
        batch = samples.batch(0)
        if size(batch[0]) < 2:
            return
        together = answer(batch)[0]
        if bool(together.isnan().any()):
            self.check_inputs()
            raise UsageError(f"model: {type(self.model).__name__} gives NaN for the first sample, whose inputs hold none")
        if not same_alone(answer, batch, together):
            raise UsageError(
                f"model: {type(self.model).__name__} gives the first sample alone other outputs than within its batch, inputs "
                f"{described(batch[0])}, so no sample can be scored alone; every input must have samples on its first axis (one "
                "that all share must not have as many rows as there are samples), or take a criterion of whole batches "
                "(gradient, snip)"
            )

    def _answers(self, function: ModelFunction) -> Callable[[Batch], Tensor]:
        """A batch's targets at the weights to score, ``(samples, targets)``."""
        theta = self.state.to(function.device)

        @torch.no_grad()
        def answer(batch: Batch) -> Tensor:
            return function(theta, to(batch[0], function.device), to(batch[1], function.device))

        return answer

    def mixes(self) -> bool:
        """Whether several ranks may not cut batches, see ``prunekit.data.sharing.mixes``."""
        if ranks.size() == 1:
            return False
        return mixes(self._answers(self.function(flat)), self.samples())

    @contextmanager
    def shared(self) -> Iterator[Samples]:
        """A rank's own scoring samples, for sums over them that ``prunekit.ranks.add_up`` is to add up inside.

        Where the model mixes its batch every rank has all, and is alone.
        """
        with sharing(self.samples(), self.mixes()) as (samples, _):
            yield samples

    def explained(self, target: str | Target | None = None) -> tuple[ModelFunction, Samples]:
        """``function(target)``, and the scoring samples as it takes them.

        The target ``loss`` is each sample's part in the loss of all scoring samples: the mean of these parts is that loss,
        whatever class weights or ignored places it has (``prunekit.task.losses``).

        Raises:
            UsageError: the loss mixes its batch.
        """
        wanted, samples = self.target if target is None else target, self.samples()
        self._check_alone(self._answers(self.function(flat)), samples)
        if wanted != "loss":
            return self.function(wanted), samples
        self.task.get_target("loss")
        loss = self.task.loss
        if loss.weights is not None:
            scale = self._loss_scale(samples)
            if scale == 1:
                return self.function(lambda out, labels: loss.of_each(out, labels)[:, None]), samples
            return self.function(lambda out, labels: loss.of_each(out, labels)[:, None] * scale), samples
        factors = torch.cat([loss.factors(out, to(labels, out.device)).cpu() for out, labels in self._outputs()])
        if bool((factors == 1).all()):
            return self.function(lambda out, labels: loss.of_each(out, labels)[:, None]), samples
        weighted = self.function(lambda out, both: (loss.of_each(out, both[0]) * both[1])[:, None])
        return weighted, samples.beside(factors)

    def _loss_scale(self, samples: Samples) -> float:
        """Times which a sample's own losses are its part in the loss of all, where the loss has known weights."""
        assert self.task.loss.weights is not None
        total = sum(self.task.loss.counted(labels, 0) for _, labels in samples)
        if not total:
            raise UsageError("data: no label of the scoring samples counts (all are ignored, or their classes weigh 0)")
        return len(samples) / total

    def spread_loss(self, spread: Spread) -> Callable[[Tensor, Labels], Tensor]:
        """The target ``loss`` of ``explained`` for a model that is ``spread``: outputs and labels of one sample to its part.

        Raises:
            UsageError: a loss of the user's, whose parts do not follow from labels alone.
        """
        self.task.get_target("loss")
        loss = self.task.loss
        if loss.weights is None:
            raise UsageError(
                f"loss: {loss.name} is your own, and what a sample counts in it is found from its batch's outputs; take "
                "gradient or snip, or leave --device-map out"
            )
        self._check_alone(lambda batch: spread.answer(batch).flatten(1), self.samples().first(2))
        scale = self._loss_scale(self.samples())
        return lambda out, labels: loss.of_each(out, labels).sum() * scale

    def _outputs(self) -> Iterator[tuple[Tensor, Labels]]:
        found: list[Tensor] = []

        def note(out: Tensor, labels: Labels) -> Tensor:
            found.append(out)
            return out.reshape(len(out), -1)

        function = self.function(note)
        theta = self.state.to(function.device)
        for x, y in self.samples():
            with torch.no_grad():
                function(theta, to(x, function.device), y)
            yield found.pop(), y

    def batch_losses(self) -> tuple[ModelFunction, Iterator[tuple[Batch, float]]]:
        """The batch's loss as a function ``(1, 1)``, and batches with what each counts in the mean over all samples.

        They are a rank's own part: what is summed over them must go through ``prunekit.ranks.add_up``. A batch stays whole where
        its loss, or the model, may mix its samples.
        """
        loss, samples = self.task.loss, self.samples()
        function = self.function(lambda out, labels: loss.batch(out, labels).reshape(1, 1))

        def parts() -> Iterator[tuple[Batch, float]]:
            counts = [len(group) for group in samples.groups]
            total = sum(loss.counted(labels, count) for (_, labels), count in zip(samples, counts, strict=True))
            if loss.weights is None or len(samples) < ranks.size() or self.mixes():
                mine, numbers = samples, ranks.dealt(range(len(counts)))
            else:
                with sharing(samples) as (mine, _):
                    numbers = range(len(mine.groups))
            for number in numbers:
                inputs, labels = mine.batch(number)
                counted = loss.counted(labels, len(mine.groups[number]))
                if counted or not total:  # the mean over a part of which nothing counts is no number
                    yield (to(inputs, function.device), to(labels, function.device)), counted / max(total, 1e-30)

        return function, parts()


def _only(classes: tuple[int, ...], whole: Target) -> Target:
    return lambda out, labels: whole(out, labels)[:, classes]


@dataclass(frozen=True)
class CriterionResult:
    """What a criterion computed: see ``Scores``; ``findings`` are facts about the scores (their error)."""

    importance: dict[str, Tensor]
    axis_sums: dict[str, Tensor] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    gradient_evaluations: int = 0
    parts: tuple[Scores, ...] = ()


@dataclass(frozen=True)
class Criterion:
    """One way to score.

    Attributes:
        compute: evidence -> what was found.
        describes: one line for help texts.
        needs_path, needs_data: what ``compute`` looks at beside the trained weights.
        by_inputs: it looks at the inputs of layers, and cannot score other weights (``Evidence.skip_unfit``).
        group: how a group's importance follows from the file, a name from ``prunekit.criteria.group_scores.GROUPINGS``: ``sum``
            of the signed axis sums (additive criteria), ``l1`` or ``l2`` norm of the importances, one ``draw`` …
        spreads: it takes what ``Evidence.spread`` gives, or looks at weights one tensor after the other.
        aggregation: how signed scores become an importance; None leaves it to the evidence. Additive criteria only.
        structure: the one structure whose units it scores, where it scores no weights (``prunekit.criteria.units``).
        silent_on: structures of whose units it says nothing, though it scores weights.
        accepts: options that may be written behind its name, from ``prunekit.criteria.spec.OPTIONS``.
        preset: options that its name stands for.
    """

    compute: Callable[[Evidence], CriterionResult]
    describes: str
    needs_path: bool = False
    needs_data: bool = False
    by_inputs: bool = False
    spreads: bool = False
    group: str = "l2"
    aggregation: str | None = None
    structure: str | None = None
    silent_on: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    preset: Mapping[str, str] = field(default_factory=dict)
