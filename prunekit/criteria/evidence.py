"""What a criterion may look at, and the shape every criterion has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.criteria.scores import Scores
from prunekit.errors import PrunekitError
from prunekit.kernel import ModelFunction, Target, from_loss
from prunekit.kernel.attribution import MEMORY
from prunekit.kernel.targets import outputs
from prunekit.trajectory import Layout, Trajectory

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Evidence:
    """A trained model, its path, scoring samples, and how to look at them.

    Attributes:
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
        options: what the criterion's own name says, ``name(key=value)``; those that are fields here are set already.
        partial: where finished chunks are kept until all are done; ``partial_key``: what they are made from.
    """

    trajectory: Trajectory
    model: nn.Module
    prunable: tuple[str, ...]
    x: Tensor | None = None
    y: Tensor | None = None
    loss: Loss = F.cross_entropy
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
    options: Mapping[str, str] = field(default_factory=dict)
    partial: Path | None = None
    partial_key: dict[str, Any] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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

    def samples(self) -> tuple[Tensor, Tensor]:
        """Scoring samples and labels.

        Raises:
            PrunekitError: none were given.
        """
        if self.x is None or self.y is None:
            raise PrunekitError(
                "gradients need scoring samples, and this run has no data: import the model again "
                "with --data my_module:data --overwrite"
            )
        return self.x, self.y

    def function(self, target: str | Target | None = None) -> ModelFunction:
        """The model with ``target`` (the evidence's own by default; ``loss``: of each sample) as a function of its weights."""
        wanted = self.target if target is None else target
        if wanted == "loss":
            wanted = from_loss(self.loss)
        if wanted == "outputs" and self.classes:
            wanted = _only(self.classes)
        return ModelFunction(self.model, self.layout, self.trajectory.fixed, wanted, self.device)


def _only(classes: tuple[int, ...]) -> Target:
    return lambda out, labels: outputs(out, labels)[:, classes]


@dataclass(frozen=True)
class Found:
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
        group: how a group's importance follows from the file, a name from ``prunekit.criteria.groups.GROUPINGS``: ``sum``
            of the signed axis sums (additive criteria), ``l1`` or ``l2`` norm of the importances, one ``draw`` …
        aggregation: how signed scores become an importance; None leaves it to the evidence. Additive criteria only.
        accepts: options that may be written behind its name, from ``prunekit.criteria.spec.OPTIONS``.
        preset: options that its name stands for.
    """

    compute: Callable[[Evidence], Found]
    describes: str
    needs_path: bool = False
    needs_data: bool = False
    group: str = "l2"
    aggregation: str | None = None
    accepts: tuple[str, ...] = ()
    preset: Mapping[str, str] = field(default_factory=dict)
