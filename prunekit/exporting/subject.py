"""What is exported: a pruned model with what is known of it, and what a format makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.apply import Manifest
from prunekit.batch import Inputs
from prunekit.errors import UsageError
from prunekit.explain import EvaluationRecord
from prunekit.exporting.vocabulary import Vocabulary
from prunekit.measure import Speed


@dataclass(frozen=True)
class Subject:
    """A pruned model, and what is known of it.

    Attributes:
        model: on the CPU, in evaluation mode, in no wrapper.
        inputs: some samples; None where there are no data.
        manifest: what was removed; None where the caller did not say.
        evaluation: the figures; None where it was not measured.
        batches: sizes at which a program's speed is measured beside torch's.
        vocabulary: what is left of its tokens, for ``hf``; None where all stay.
    """

    model: nn.Module
    inputs: Inputs | None
    manifest: Manifest | None = None
    evaluation: EvaluationRecord | None = None
    batches: tuple[int, ...] = (1,)
    vocabulary: Vocabulary | None = None

    def given_inputs(self, to: str) -> Inputs:
        """The samples.

        Raises:
            UsageError: there are none.
        """
        if self.inputs is None:
            raise UsageError(
                f"export to {to} runs the model, and there are no data; give it samples (import … --data, or inputs=)"
            )
        return self.inputs

    def known_plan(self, to: str) -> Manifest:
        """What was removed.

        Raises:
            UsageError: the caller did not say.
        """
        if self.manifest is None:
            raise UsageError(f"export to {to} writes down what was removed, for rebuilding the model; give it plan=")
        return self.manifest


@dataclass(frozen=True)
class Written:
    """What a format wrote.

    Attributes:
        loads_with: what reads it, in words.
        tolerance: what answers may differ by, as a share of their size; None where no answers were compared.
        difference: what they differed by.
        samples: sizes of the batches that were compared.
        notes: what the user should know.
        axes: of a program, input -> its axes' sizes, or what they are free in.
        speed: of a program, batch size -> its speed (``pruned_ms``) beside torch's (``dense_ms``).
        pruning: how the model was pruned, where no run beside it says so.
    """

    loads_with: str
    tolerance: float | None = None
    difference: float | None = None
    samples: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    axes: Mapping[str, list[str | int]] | None = None
    speed: Mapping[str, Speed] | None = None
    pruning: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Format:
    """A form that a pruned model is exported to.

    Attributes:
        write: writes a subject into an empty folder, reads it back and compares.
        about: what is written, in words.
    """

    write: Callable[[Subject, Path], Written]
    about: str
