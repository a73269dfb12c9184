"""eval.json: a pruned model measured on test data beside the dense one, and the kernel's account of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NotRequired, TypedDict

from prunekit.artifact import SOMETIMES, Artifact, Cost, conform
from prunekit.explain.account import Account
from prunekit.measure import Lost
from prunekit.measure.generation import Generation
from prunekit.task.evaluation import CLASSIFICATION, MeasureTold
from prunekit.task.protocol import Paired, Protocol


class Shares(TypedDict):
    """Shares of parameters that were removed: of the prunable ones, and of all."""

    prunable: float
    all: float


class Counts(TypedDict):
    """Weights of a parameter, and how many of them are kept."""

    total: int
    kept: int


class Latency(TypedDict):
    """Milliseconds by batch: ``dense_ms``, ``pruned_ms``, of a squeezed one also ``masked_ms``, and ``ratio``, pruned over dense.

    Beside them ``prunekit.measure.Speed`` without its batch, and how passes were timed, and by batch size why a model that
    computes much less is hardly faster (``prunekit.measure.bound``). Older files lack these.
    """

    machine: str
    batches: dict[str, dict[str, float]]
    conditions: NotRequired[str]
    why: NotRequired[dict[str, str]]


class Budget(TypedDict):
    """A budget that a model was pruned to: its name and value, and what was reached, in the same unit."""

    name: str
    asked: float
    reached: float


class LostOn(TypedDict):
    """What was lost in the task's first measure, on test data and, where the model's manifest tells it, on validation data."""

    validation: NotRequired[Lost]
    test: Lost


class OnClasses(TypedDict):
    """Figures of a model that was pruned for some classes, on their test samples and on the others."""

    classes: list[int]
    samples: int
    on_classes: NotRequired[dict[str, float]]
    on_others: NotRequired[dict[str, float]]


class Parts(TypedDict):
    """A number of the samples that a mask is learnt from, and of the samples that accept it: their count, or the divergence."""

    learn: float
    accept: float


class Round(TypedDict):
    """A step of refining whose mask was taken: divergences, and how many weights or units changed places."""

    stage: str
    round: int
    learn: float
    accept: float
    swapped: int


class HarnessTask(TypedDict):
    """A task of the lm-evaluation-harness: its version, documents, and the figures of both models by the harness's names."""

    version: str
    samples: NotRequired[int]
    dense: dict[str, float]
    pruned: dict[str, float]


class Harness(TypedDict):
    """What the lm-evaluation-harness measured, by task."""

    harness: str
    tasks: dict[str, HarnessTask]


class OnnxSpeed(TypedDict):
    """Median milliseconds of dense and pruned model in torch and of the export, which is ``speedup`` times as fast as the pruned

    one in torch, between ``low`` and ``high``.
    """

    dense_ms: float
    torch_ms: float
    onnx_ms: float
    speedup: float
    low: float
    high: float


class InOnnx(TypedDict):
    """The ONNX export in a folder inside the pruned model's: its file's checksum, and its speed by batch, on the processor."""

    folder: str
    export: str
    machine: str
    batches: dict[str, OnnxSpeed]


class Generated(Generation):
    """Tokens a second and memory; ``asked``: the recipe's prompt and tokens, of which a model with few positions takes fewer."""

    asked: list[int]


class LanguageFigures(TypedDict):
    """Of a language model: how its figures came about, what pruned and dense differ by, how fast they read and write."""

    protocol: Protocol
    paired: Paired
    generation: NotRequired[Generated]


class Refined(TypedDict):
    """What a refinement looked at, from and to which divergence it came, how many came back, and how it ended."""

    target: str
    samples: Parts
    before: Parts
    after: Parts
    changed: int
    ended: str


class Refinement(Refined):
    """A plan's refinement, round by round, and those after fine-tuning."""

    rounds: list[Round]
    again: NotRequired[list[Refined]]


class Sources(TypedDict):
    """What an evaluation is made from; identities of data and options beside it."""

    weights: str
    trajectory: str
    criterion: str
    allocation: str
    structure: str


class ModelSize(TypedDict):
    """A model's sizes; the figures of the task's measures stand beside them, and ``zipped``, which older files lack."""

    parameters: int
    nonzero: int
    macs: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Artifact):
    """A pruned model in figures.

    Attributes:
        made_from: ``Sources``, and what else decides whether it would be the same again.
        measures: of the task, against labels first.
        dense, pruned: figures and ``ModelSize``.
        asked_classes: of a model that was pruned for some classes.
        layers: by prunable parameter.
        refine: None for a plan that was not refined.
        kernel: None for a run without a path.
        masked: of a squeezed model, what it was before: figures and ``ModelSize``. Older files lack it.
        lost: of the first measure. Older files lack it.
        budget: of a model that was pruned to one.
        lm_eval: where the harness was asked for.
        onnx: where the pruned model's folder holds an ONNX export of it.
        language: of a language model. Older files lack it.
    """

    KIND: ClassVar[str] = "evaluation"
    CALLED: ClassVar[str] = "evaluation"

    made_from: dict[str, Any]
    test_samples: int
    measures: list[MeasureTold] = field(default_factory=lambda: list(CLASSIFICATION))
    sparsity: Shares
    dense: dict[str, float]
    pruned: dict[str, float]
    asked_classes: OnClasses | None = field(default=None, metadata=SOMETIMES)
    layers: dict[str, Counts]
    latency: Latency
    refine: Refinement | None = None
    kernel: Account | None
    masked: dict[str, float] | None = field(default=None, metadata=SOMETIMES)
    lost: LostOn | None = field(default=None, metadata=SOMETIMES)
    budget: Budget | None = field(default=None, metadata=SOMETIMES)
    lm_eval: Harness | None = field(default=None, metadata=SOMETIMES)
    onnx: InOnnx | None = field(default=None, metadata=SOMETIMES)
    language: LanguageFigures | None = field(default=None, metadata=SOMETIMES)
    cost: Cost

    @property
    def models(self) -> Mapping[str, dict[str, float]]:
        """Figures and sizes of every model that was measured, by the field's name."""
        found = {"dense": self.dense, "masked": self.masked, "pruned": self.pruned}
        return {name: figures for name, figures in found.items() if figures is not None}

    def check(self) -> None:
        """Shares are shares; every model has its sizes, latencies and figures; the dense one is not close to itself."""
        conform(self.made_from, Sources, "made_from")
        for name, share in (("prunable", self.sparsity["prunable"]), ("all", self.sparsity["all"])):
            if not 0 <= share <= 1:
                raise ValueError(f"sparsity.{name} is {share}; it must be between 0 and 1")
        for name, figures in self.models.items():
            conform(figures, ModelSize, name)
            for measure in self.measures:
                if name != "dense" or not measure["close"]:
                    conform(figures.get(measure["name"]), float, f"{name}.{measure['name']}")
            for size, times in self.latency["batches"].items():
                if not size.isdecimal():
                    raise ValueError(f"latency.batches.{size}: must be a number of samples")
                conform(times.get(f"{name}_ms"), float, f"latency.batches.{size}.{name}_ms")
        for name, told in (self.lm_eval or {"tasks": {}})["tasks"].items():
            if told["dense"].keys() != told["pruned"].keys():
                raise ValueError(f"lm_eval.tasks.{name} has other figures of the dense model than of the pruned one")
        if not all(counts["total"] for counts in self.layers.values()):
            raise ValueError("layers holds a parameter without weights")
