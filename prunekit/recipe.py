"""What a recipe says: the YAML schema, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import nn

from prunekit import checkpoint
from prunekit.criteria import AGGREGATIONS, DEFAULT, expand
from prunekit.errors import UsageError, nearest, quoted
from prunekit.imports import call, load_object
from prunekit.kernel import RULES, SHARES
from prunekit.plan import ALLOCATIONS, GROUPED, asked_sparsity, check_structure
from prunekit.search.objective import OBJECTIVES
from prunekit.search.repair import get_repair
from prunekit.search.schedule import SCHEDULES, SPACINGS, check_again, check_steps
from prunekit.structure import implied_sparsity
from prunekit.task import TARGET_NAMES, TASKS, Task, get_task
from prunekit.training import AUGMENTATIONS, Augment
from prunekit.yaml_file import read_yaml, to_yaml

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Large = Annotated[int, Field(ge=1, le=10**15)]
Nodes = Annotated[int, Field(ge=1, le=10**4)]
Positive = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]
CLASS_TASKS = (None, "classification", "segmentation", "token_classification", "causal_lm", "masked_lm", "seq2seq")
RESOLVED = "# The resolved recipe of this run: every value, defaults included.\n"
OWN_LOSSES = ("cross_entropy", "task")
"""Losses by name: both are the task's own, ``cross_entropy`` of tasks with classes."""


def _known(value: str, known: Any, what: str) -> str:
    if value not in known:
        raise ValueError(f"{what} {value!r} does not exist; {nearest(value, list(known))}")
    return value


def _one_of(known: Any, what: str) -> AfterValidator:
    return AfterValidator(lambda value: _known(value, known, what))


def _criterion(value: str) -> str:
    """Checked and, unless it stands for several, in its canonical form."""
    try:
        names = expand(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return names[0] if len(names) == 1 else value


def _switched(value: Any) -> Any:
    """A section that ``true`` turns on with its defaults, and ``false`` off."""
    return {} if value is True else None if value is False else value


def _structure(value: str) -> str:
    try:
        check_structure(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


CriterionName = Annotated[str, AfterValidator(_criterion)]
AllocationName = Annotated[str, _one_of(ALLOCATIONS, "allocation")]
StructureName = Annotated[str, AfterValidator(_structure)]
RuleName = Annotated[str, _one_of(RULES, "quadrature rule")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Factory(_Section):
    """``factory``: import path ``module:function``; ``args``: its keyword arguments."""

    factory: str
    args: dict[str, Any] = {}


class Data(Factory):
    """``path``: where the data lies, for factories that read files; it is given to the factory as its ``path``."""

    path: str | None = None

    def arguments(self) -> dict[str, Any]:
        return self.args if self.path is None else {**self.args, "path": self.path}


class Optimizer(_Section):
    """``betas`` are for adam and adamw, ``momentum`` and ``nesterov`` for sgd."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    momentum: Share = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _belongs(self) -> Optimizer:
        foreign = {"betas"} if self.name == "sgd" else {"momentum", "nesterov"}
        given = {k for k in foreign & self.model_fields_set if getattr(self, k) != type(self).model_fields[k].default}
        if given:
            raise ValueError(f"{', '.join(sorted(given))} is not an option of {self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


class Schedule(_Section):
    """``onecycle`` rises to the optimizer's lr over ``warmup`` of the steps and falls to near 0; ``triangular`` does so from 0

    to 0 along straight lines.
    """

    name: Literal["onecycle", "triangular", "cosine", "constant"] = "onecycle"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.2


class Record(_Section):
    """What the recorder keeps: see ``prunekit.Recorder``."""

    every: Count = 1
    states: Literal["whole", "half"] = "whole"
    second_moments: bool = False
    snapshot_every: Annotated[int, Field(ge=0)] = 100


class Watch(_Section):
    """The task's first measure on training and validation data ``every`` so many epochs, kept in train.json.

    ``until``: training ends early once both are at least this good (a share, of accuracy).
    """

    every: Count = 10
    until: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Train(_Section):
    """``drop_last``: leave out an epoch's last batch where it is smaller; ``augment``: a name from

    ``prunekit.training.AUGMENTATIONS``, or a function ``(inputs, generator) -> inputs`` by import path.
    """

    record: Record = Record()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: Count = 20
    batch_size: Count = 64
    drop_last: bool = False
    augment: str | None = None
    watch: Watch | None = None

    @field_validator("augment")
    @classmethod
    def _augment(cls, value: str | None) -> str | None:
        return value if value is None or ":" in value else _known(value, AUGMENTATIONS, "augmentation")


class Prunable(_Section):
    """``ignore``: shell-style patterns of parameter names that may not be pruned; ``include``: of parameters that may be, though

    they are no layer's weights, such as ``positions``.
    """

    ignore: list[str] = []
    include: list[str] = []


class Score(_Section):
    """``criteria``: names with options and compositions, see ``prunekit.criteria.spec``; ``samples``: at most so many scoring

    samples. The rest says how influence looks at the path (docs/kernel.md):

    ``quadrature: ranking`` takes a fixed ``rule`` with ``nodes``, in the first steps other nodes by ``early: [steps, nodes]``;
    ``reconstruction`` halves steps until every interval's sum is within ``tolerance``. ``memory`` holds the scores in work.

    ``skip_unfit``: wanda and obs score by magnitude what has no inputs that they can look at, instead of refusing.
    """

    criteria: Annotated[list[CriterionName], Field(min_length=1)] = list(DEFAULT)
    target: str | None = None
    samples: Count = 160
    share: Annotated[str, _one_of(SHARES, "share")] = "kernel"
    aggregation: Annotated[str, _one_of(AGGREGATIONS, "aggregation")] = "l1"
    quadrature: Literal["ranking", "reconstruction"] = "ranking"
    rule: RuleName = "midpoint"
    nodes: Nodes = 1
    early: tuple[Count, Nodes] | None = None
    tolerance: Positive = 0.01
    stride: Count = 1
    phase: tuple[int, int] | None = None
    memory: str = "512MiB"
    skip_unfit: bool = False

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        parse_bytes(value)
        return value

    def options(self) -> dict[str, Any]:
        """The fields of ``Evidence`` that these keys set."""
        return {
            "share": self.share, "aggregation": self.aggregation, "rule": self.rule, "nodes": self.nodes, "early": self.early,
            "tolerance": self.tolerance if self.quadrature == "reconstruction" else None,
            "stride": self.stride, "phase": self.phase, "memory": parse_bytes(self.memory),
            "skip_unfit": self.skip_unfit,
        }  # fmt: skip

    @field_validator("target")
    @classmethod
    def _target(cls, value: str | None) -> str | None:
        return value if value is None or ":" in value else _known(value, TARGET_NAMES, "target")


class Attention(_Section):
    """Names of one attention's linear layers, and how many heads they make; ``kv_heads``: fewer with grouped queries.

    ``qkv`` in the place of ``q``, ``k`` and ``v``: one layer for all three.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    o: str
    heads: Count | None = None
    kv_heads: Count | None = None

    @model_validator(mode="after")
    def _whole(self) -> Attention:
        separate = [name is not None for name in (self.q, self.k, self.v)]
        if all(separate) == (self.qkv is not None) or any(separate) != all(separate):
            raise ValueError("give q, k and v, or qkv alone")
        return self


class Structure(_Section):
    """``attention``: attention whose heads the names of its layers do not give away.

    ``round_to``, ``min_units``: of channels and heads, what stays is a multiple of this, and so many at least; see ``make_plan``.
    """

    attention: list[Attention] = []
    round_to: Count = 1
    min_units: Count = 1

    def mappings(self) -> list[dict[str, Any]]:
        return [spec.model_dump() for spec in self.attention]


BUDGETS = ("max_params", "max_macs", "max_bytes", "max_latency_ms", "max_accuracy_drop", "max_drop")
DROPS = ("max_accuracy_drop", "max_drop")
"""Budgets of what the task's first measure may lose on validation data."""


class Distill(_Section):
    """Soft labels from the dense model: see ``prunekit.training.Distillation``."""

    temperature: Positive = 4.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5


class Finetune(_Section):
    """``epochs`` of each round; below 1, a share of the dense training's; null, as many as that had.

    ``lr``, ``optimizer`` and ``schedule`` (of the rate) are the dense training's where they are null, ``seed`` is the recipe's.
    """

    epochs: Positive | None = None
    lr: Positive | None = None
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    distill: Distill | None = None

    @field_validator("epochs")
    @classmethod
    def _epochs(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != round(value):
            raise ValueError("write a whole number, or a share of the dense training's epochs below 1")
        return value


class PruneSchedule(_Section):
    """See ``prunekit.search.Schedule``."""

    name: Annotated[str, _one_of(SCHEDULES, "schedule")] = "one-shot"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    spacing: Annotated[str, _one_of(SPACINGS, "spacing")] = "geometric"
    every: Count | None = None


class Steps(_Section):
    """How pruning goes on: in which steps, with what training, from which weights."""

    schedule: PruneSchedule = PruneSchedule()
    finetune: Finetune | None = None
    recalibrate: bool = False
    rewind: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Steps:
        if self.schedule.name == "gradual" and self.finetune is None:
            raise ValueError("schedule gradual prunes while it fine-tunes; give finetune (--finetune EPOCHS)")
        if self.rewind is not None:
            if self.schedule.name == "gradual":
                raise ValueError("rewind goes with schedule one-shot or iterative")
            given = [
                k for k in ("lr", "optimizer", "schedule", "seed") if self.finetune and getattr(self.finetune, k) is not None
            ]
            if given:
                raise ValueError(f"rewind trains on as the dense training did; leave out finetune.{given[0]}")
        return self

    @classmethod
    def of(cls, content: dict[str, Any], source: str) -> Self:
        """Checks values that come from ``source``; raises UsageError."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UsageError(_faults(source, error.errors())) from None

    @property
    def trains(self) -> bool:
        return self.finetune is not None or self.rewind is not None

    def request(self) -> dict[str, Any]:
        """The values that decide the pruned model; empty for plain pruning at once."""
        if self.schedule.name == "one-shot" and not self.trains and not self.recalibrate:
            return {}
        found = self.model_dump(mode="json", include=set(Steps.model_fields))
        return found | ({"schedule": None} if self.schedule.name == "one-shot" else {})

    def of_training(self) -> Finetune:
        return self.finetune or Finetune()


TRY_FOR = "60s"
"""How long criterion auto tries to refine by itself."""


class Refinement(_Section):
    """How a plan is repaired by the blame of what it removed (docs/refine.md).

    ``learn``: learn a mask for ``steps`` steps first; ``rounds``: of swaps, at most; ``budget``: stop after so long, such as
    ``60s`` or ``5m``; ``target``: what is lowered, ``kl`` (to the dense model), ``loss``, or ``module:function``; ``samples``: at
    most so many training samples to learn from; the scoring samples accept.
    """

    rounds: Annotated[int, Field(ge=0, le=10**6)] = 30
    learn: bool = True
    steps: Count = 300
    budget: str | None = None
    target: str = "kl"
    samples: Count = 1000

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return value if ":" in value else _known(value, OBJECTIVES, "target")

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            parse_seconds(value)
        return value

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``prunekit.refine`` that these keys set."""
        return {
            "rounds": self.rounds, "learn": self.learn, "steps": self.steps,
            "budget_seconds": None if self.budget is None else parse_seconds(self.budget),
            "target": load_object(self.target, "refine.target") if ":" in self.target else self.target,
        }  # fmt: skip


class Refine(Refinement):
    """``when``: ``always``; ``better``: only if the pruned model is better for it on validation data; ``never``. ``true`` and

    ``false`` are short for the first and the last. ``again``: so many times more after fine-tuning, each followed by as much
    fine-tuning (docs/schedules.md).
    """

    when: Literal["always", "better", "never"] = "always"
    again: Annotated[int, Field(ge=0, le=1000)] = 0

    @model_validator(mode="after")
    def _whole(self) -> Refine:
        if self.again and self.when != "always":
            raise ValueError(f"again goes with when: always, not {self.when}: what comes back is not tried, but trained")
        return self


class CompareRefine(Refinement):
    """``sparsities``: of those compared, where the best plan is refined too; null: everywhere."""

    sparsities: list[Share] | None = None


class Compare(_Section):
    """``refine``: also repair the best plan of every structure and sparsity (``true`` takes the defaults)."""

    structures: Annotated[list[StructureName], Field(min_length=1)] = ["unstructured", "channels"]
    allocations: Annotated[list[AllocationName], Field(min_length=1)] = ["global", "uniform", "mean", "lamp"]
    sparsities: Annotated[list[Share], Field(min_length=1)] = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
    refine: Annotated[CompareRefine | None, BeforeValidator(_switched)] = None

    @model_validator(mode="after")
    def _compared(self) -> Compare:
        for sparsity in (self.refine.sparsities if self.refine else None) or ():
            if sparsity not in self.sparsities:
                raise ValueError(f"refine.sparsities has {sparsity:g}, which is none of the sparsities compared")
        return self


class Prune(Steps):
    """One pruned model.

    ``criterion``: a name, or ``auto``: the criterion and allocation that do best on validation data there; ``tempered(...)`` is
    the best of what it stands for. ``sparsity``: share to remove; N:M says it itself, and a budget (one of ``max_…``: parameters,
    MACs, bytes, measured milliseconds, points of validation accuracy, or ``max_drop``: what the task's first measure may lose
    there, in its unit) finds it. ``allocation``: null leaves the choice to
    ``auto`` (among the recipe's), else means ``global``. ``ratios``, ``floor``, ``round_to`` and
    ``min_units`` (null for those of ``structure``): see ``make_plan``. ``compensate``: kept weights
    make up for removed ones, computed from training samples and judged on the scoring samples.
    ``refine``: repair the plan before anything else happens,
    in a schedule every round's plan; null lets ``auto`` try it, for ``TRY_FOR`` at most, where it makes one plan. ``squeeze``:
    take out the channels that a mask left without inputs or readers.
    ``classes``: keep what serves these classes: scores are made from their scoring samples (of the target ``outputs``, from
    their outputs), and every choice on validation data is made on their samples.
    """

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    criterion: str = "auto"
    sparsity: Share | None = None
    structure: StructureName = "unstructured"
    allocation: AllocationName | None = None
    ratios: dict[str, Share] = {}
    floor: Share = 0.0
    round_to: Count | None = None
    min_units: Count | None = None
    compensate: bool = False
    refine: Refine | None = None
    squeeze: bool = False
    classes: list[Annotated[int, Field(ge=0, le=10**6)]] = []
    max_params: Large | None = None
    max_macs: Large | None = None
    max_bytes: Large | None = None
    max_latency_ms: Positive | None = None
    max_accuracy_drop: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @field_validator("criterion")
    @classmethod
    def _named(cls, value: str) -> str:
        return value if value == "auto" else _criterion(value)

    @field_validator("refine", mode="before")
    @classmethod
    def _refine(cls, value: Any) -> Any:
        return {"when": "always" if value else "never"} if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _repairable(self) -> Prune:
        if self.squeeze and self.structure in GROUPED:
            raise ValueError(f"squeeze is for plans of masks; {self.structure} are cut out as they are")
        for key in ("round_to", "min_units"):
            if getattr(self, key) is not None and self.structure not in ("channels", "heads"):
                raise ValueError(f"{key} is for channels and heads, and the structure is {self.structure}")
        if self.squeeze and self.request():
            raise ValueError("squeeze is for pruning at once; leave out schedule, finetune, rewind and recalibrate")
        try:
            check_steps(self.structure, self.schedule.name)
            if self.refine is not None and self.refine.again:
                check_again(self.schedule.name, self.finetune is not None, self.rewind is not None)
                if self.max_accuracy_drop is not None:
                    raise UsageError("refining again is for a given size; with max_accuracy_drop every try would train so often")
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def repair(self) -> Refine | None:
        """The refinement that is asked for, or that auto tries unasked where one plan is made; None for none."""
        if self.refine is not None:
            return None if self.refine.when == "never" else self.refine
        tries = self.criterion == "auto" and self.schedule.name == "one-shot" and self.max_accuracy_drop is None
        return Refine(when="better", budget=TRY_FOR) if tries else None

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a class is given twice")
        return sorted(value)

    @property
    def budget(self) -> tuple[str, float]:
        """The budget that is set, and its value; ("", 0) for none."""
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        return next(iter(given.items()), ("", 0.0))

    @model_validator(mode="after")
    def _sparsity(self) -> Prune:
        given = [name for name in ("sparsity", *BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are given; one of them decides how much goes")
        if self.compensate and self.request():
            raise ValueError("compensate is for pruning at once; leave out schedule, finetune, rewind and recalibrate")
        if self.allocation is not None and implied_sparsity(self.structure) is not None:
            raise ValueError(f"{self.structure} keeps the same share everywhere; leave allocation out")
        if self.schedule.every is not None and self.schedule.name != "gradual":
            raise ValueError(f"every is about schedule gradual, not {self.schedule.name}")
        try:
            if self.budget[0] and implied_sparsity(self.structure) is None:
                return self
            if self.budget[0]:
                raise ValueError(f"{self.structure} removes a fixed share; leave {self.budget[0]} out")
            asked_sparsity(self.structure, self.sparsity)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self


class Tuning(_Section):
    """After how much fine-tuning a study compares, and at which sparsities."""

    epochs: Count = 10
    sparsities: dict[StructureName, list[Share]] = {}


class Repairs(_Section):
    """Masks repaired, and other ways to masks of that size (``prunekit.search.repair``); ``refine: true`` takes the defaults.

    ``ways``: by structure, the rest takes ``refined``; ``of``: methods whose plans are repaired, ``auto`` among them: at every
    sparsity the plan that does best on validation data; null: those that are looked at again; ``sparsities``: by structure, null:
    those of ``tune``; ``samples``: of the training data, to learn from, accepted on the scoring samples; null: a quarter
    of the scoring samples accepts, the rest is learnt from; ``compensate``: also with their weights compensated; ``tune``:
    the ways that are compared after fine-tuning too, where ``tune`` of the study says; ``again``: refined plans also refined so
    many times again within that fine-tuning, its epochs split into ``again + 1`` runs (``refined again``).
    """

    ways: dict[StructureName, list[str]] = {}
    of: dict[StructureName, list[CriterionName | Literal["auto"]]] = {}
    sparsities: dict[StructureName, list[Share]] | None = None
    samples: Count | None = None
    compensate: bool = True
    tune: list[str] = []
    again: Annotated[int, Field(ge=0, le=1000)] = 0

    @model_validator(mode="after")
    def _tuned(self) -> Repairs:
        if self.again and "refined" not in self.tune:
            raise ValueError("refine.again compares after fine-tuning; name refined in refine.tune too")
        return self

    @model_validator(mode="after")
    def _known(self) -> Repairs:
        try:
            for structure, ways in self.ways.items():
                for way in ways:
                    get_repair(way, structure)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self


LAYERS: Final = "layers"


class Study(_Section):
    """A comparison over cases and seeds: ``prunekit compare STUDY --out DIR``.

    ``cases``: name -> recipe, its path relative to the study's file; ``criteria``: each one line of the result, ``tempered(...)``
    the best of the compositions that it stands for on validation data; ``control``: also plans shuffled within layers;
    ``samples``: scoring samples. The ``leading`` criteria on validation data and those in ``always`` are compared again with
    their weights compensated (``compensate``; ``layers``: by every layer's outputs alone), after fine-tuning (``tune``), and with
    their plans repaired (``refine``).
    """

    cases: Annotated[dict[str, str], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0, 1, 2]
    criteria: Annotated[list[CriterionName], Field(min_length=1)]
    structures: Annotated[dict[StructureName, Annotated[list[Share], Field(min_length=1)]], Field(min_length=1)]
    allocations: dict[StructureName, Annotated[list[AllocationName], Field(min_length=1)]] = {}
    control: bool = True
    samples: Count = 160
    leading: Annotated[int, Field(ge=0)] = 3
    always: list[CriterionName] = ["magnitude", "random"]
    compensate: bool | Literal["layers"] = False
    tune: Tuning | None = None
    refine: Annotated[Repairs | None, BeforeValidator(_switched)] = None

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed counts once")
        return value

    @field_validator("cases")
    @classmethod
    def _cases(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(f"case {name!r}: use letters, digits, '.', '_' and '-'")
        return value

    @model_validator(mode="after")
    def _refinable(self) -> Study:
        if self.refine is not None:
            self._check_repairs(self.refine)
        return self

    def _check_repairs(self, refine: Repairs) -> None:
        if not any((refine.sparsities or (self.tune.sparsities if self.tune else {})).values()):
            raise ValueError("refine needs refine.sparsities or tune.sparsities of one of the structures")
        known = {*self.criteria, *self.always, "auto"}
        for structure in {*refine.ways, *refine.of, *(refine.sparsities or {})}:
            if structure not in self.structures:
                raise ValueError(f"refine names {structure}, which is none of the structures compared")
        for method in (m for methods in refine.of.values() for m in methods):
            if method not in known:
                raise ValueError(f"refine.of names {method}, which is none of the criteria compared")
        for structure, compared in self.structures.items():
            ways = self.ways_of(structure)
            if len(set(ways)) < len(ways):
                raise ValueError(f"refine.ways of {structure} names one twice")
            extra = sorted(set(self.refined_at(structure)) - set(compared))
            if extra and refine.sparsities is not None:
                raise ValueError(f"refine.sparsities has {extra[0]:g}, which is none of the sparsities compared for {structure}")
            if extra and "auto" in refine.of.get(structure, ()):
                raise ValueError(f"refine.of auto needs {extra[0]:g} among the sparsities compared for {structure}")
        if refine.again and self.tune is not None and self.tune.epochs <= refine.again:
            raise ValueError(f"refine.again is {refine.again}, tune.epochs {self.tune.epochs}; each run needs an epoch")
        unused = sorted(set(refine.tune) - {way for structure in self.structures for way in self.ways_of(structure)})
        if unused:
            raise ValueError(f"refine.tune names {unused[0]}, which is none of the ways")

    def refined_at(self, structure: str) -> list[float]:
        """Sparsities at which plans are repaired too."""
        if self.refine is None:
            return []
        tuned = self.tune.sparsities if self.tune else {}
        return list((tuned if self.refine.sparsities is None else self.refine.sparsities).get(structure, ()))

    def ways_of(self, structure: str) -> list[str]:
        """How its plans are repaired."""
        return [] if self.refine is None else list(self.refine.ways.get(structure, ["refined"]))

    def refined_again_at(self, structure: str) -> list[float]:
        """Sparsities at which what was refined and fine-tuned is refined again."""
        if self.refine is None or not self.refine.again or "refined" not in self.ways_of(structure):
            return []
        return [s for s in self.refined_at(structure) if s in self.tuned_at(structure)]

    def tuned_at(self, structure: str) -> list[float]:
        """Sparsities at which plans are fine-tuned."""
        return [] if self.tune is None else list(self.tune.sparsities.get(structure, ()))

    def allocations_of(self, structure: str) -> list[str]:
        return list(self.allocations.get(structure, ["global", "uniform", "mean"]))

    @classmethod
    def load(cls, path: Path) -> Study:
        """Reads a study.

        Raises:
            UsageError: as ``Recipe.load``; recipes are looked for when they are trained.
        """
        return cls.of(read_yaml(path), path)

    @classmethod
    def of(cls, content: dict[str, Any], source: str | Path) -> Study:
        """Checks values that come from ``source``; raises UsageError."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UsageError(_faults(source, error.errors(), cls)) from None


class Eval(_Section):
    """``samples``: test samples whose outputs the kernel rebuilds; ``tolerance``: allowed error of every interval per

    sample, reached by halving; ``nodes``: a fixed number of nodes a step by ``rule`` instead (the pruning step keeps its
    tolerance); ``stride``: kept states a piece.
    """

    samples: Count = 128
    tolerance: Positive = 0.005
    nodes: Nodes | None = None
    rule: RuleName = "midpoint"
    stride: Count = 1
    latency_batches: list[Count] = [1, 64]


class Recipe(_Section):
    """A whole run. Keys that are not here are refused.

    ``task``: what the model is for, a name from ``prunekit.task.TASKS``, or a mapping of its ``name`` and options, or a
    ``factory`` (``module:task``) and its ``args``; null where data and model leave no doubt. ``loss``: ``cross_entropy``,
    ``task`` (the task's own), or ``module:function``.

    ``threads``: that torch computes with; null leaves it to torch. Small models are as fast with one, and keep their
    speed when other programs want the processor too.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    model: Factory
    data: Data | None = None
    task: str | dict[str, Any] | None = None
    loss: str = "cross_entropy"
    train: Train = Train()
    prunable: Prunable = Prunable()
    structure: Structure = Structure()
    score: Score = Score()
    compare: Compare = Compare()
    prune: list[Prune] = []
    eval: Eval = Eval()

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        return value if ":" in value else _known(value, OWN_LOSSES, "loss")

    @field_validator("task")
    @classmethod
    def _task(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        name = value.get("name", value.get("factory")) if isinstance(value, dict) else value
        if isinstance(value, dict) and (not isinstance(name, str) or ("name" in value) == ("factory" in value)):
            raise ValueError("give name (of a task) with its options, or factory (module:task) with its args")
        if isinstance(value, dict) and "factory" in value and (unknown := set(value) - {"factory", "args"}):
            raise ValueError(f"{sorted(unknown)[0]} is not a key of it; factory goes with args alone")
        if isinstance(name, str) and ":" not in name:
            _known(name, TASKS, "task")
        return value

    @model_validator(mode="after")
    def _loss_of_task(self) -> Recipe:
        if "loss" not in self.model_fields_set and self.task is not None and not self._has_classes():
            object.__setattr__(self, "loss", "task")
        return self

    def _has_classes(self) -> bool:
        name = self.task.get("name") if isinstance(self.task, dict) else self.task
        return name in CLASS_TASKS

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        return str(check_device(value))

    @field_validator("prune")
    @classmethod
    def _names(cls, value: list[Prune]) -> list[Prune]:
        names = [p.name for p in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"name {name!r} is used twice; each pruned model needs its own")
        return value

    # -- what the names stand for ------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """A new model, initialised from the seed."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        model = call(self.model.factory, "model", self.model.args)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model.factory: {self.model.factory} returned a {type(model).__name__}, not an nn.Module")
        return model

    def build_optimizer(self, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
        """Optimizer and learning-rate schedule over ``steps`` steps; the schedule leaves momentum and betas alone."""
        optimizer = self.optimizer_of(model, self.train.optimizer)
        return optimizer, self.scheduler_of(optimizer, steps, self.train.schedule)

    @staticmethod
    def optimizer_of(model: nn.Module, o: Optimizer) -> torch.optim.Optimizer:
        """The optimizer that ``o`` describes, for the trained parameters of ``model``."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if o.name == "sgd":
            return torch.optim.SGD(parameters, o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay)
        kind = torch.optim.AdamW if o.name == "adamw" else torch.optim.Adam
        return kind(parameters, o.lr, betas=o.betas, weight_decay=o.weight_decay)

    @staticmethod
    def scheduler_of(optimizer: torch.optim.Optimizer, steps: int, schedule: Schedule) -> Any:
        """The schedule of the rate over ``steps`` steps, from the optimizer's own rate; None for a constant one."""
        if schedule.name == "onecycle":
            peak = optimizer.param_groups[0]["lr"]
            return torch.optim.lr_scheduler.OneCycleLR(
                optimizer, peak, total_steps=steps, pct_start=schedule.warmup, cycle_momentum=False
            )
        if schedule.name == "triangular":
            peak = schedule.warmup * steps
            return torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(step / peak, max(0.0, (steps - step) / (steps - peak)))
            )
        if schedule.name == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return None

    def load_loss(self) -> Callable[..., Any] | None:
        """The user's loss ``(outputs, labels) -> scalar``; None for the task's own."""
        if self.loss in OWN_LOSSES:
            return None
        found: Callable[..., Any] = load_object(self.loss, "loss")
        return found

    def load_task(self) -> Task:
        """What the model is for, with the recipe's loss; classification where the recipe does not say.

        Raises:
            UsageError: there is no such task, or it is none.
        """
        loss = self.load_loss()
        if isinstance(self.task, str) and ":" in self.task:
            return self._own_task(load_object(self.task, "task"), {}, loss)
        if isinstance(self.task, dict) and "factory" in self.task:
            return self._own_task(load_object(self.task["factory"], "task.factory"), self.task.get("args", {}), loss)
        if isinstance(self.task, dict):
            options = {key: value for key, value in self.task.items() if key != "name"}
            return get_task(self.task["name"], loss, **options)
        return get_task(self.task, loss)

    def _own_task(self, found: Any, arguments: dict[str, Any], loss: Any) -> Task:
        """A task of the user's: a class, a function that makes one, or one that is made."""
        name = self.task if isinstance(self.task, str) else "task.factory"
        if not isinstance(found, Task):
            try:
                found = found(**arguments)
            except UsageError:
                raise
            except Exception as error:  # the user's own
                raise UsageError(f"task: {name} failed: {quoted(error)}") from error
        if not isinstance(found, Task):
            raise UsageError(f"task: {name} gave a {type(found).__name__}, not a prunekit.Task")
        return found if loss is None else found.with_loss(loss)

    def load_augment(self) -> Augment | None:
        """What changes the training inputs; None for nothing."""
        name = self.train.augment
        if name is None or name in AUGMENTATIONS:
            return None if name is None else AUGMENTATIONS[name]
        found: Augment = load_object(name, "train.augment")
        return found

    def load_target(self) -> Any:
        """A target's name, or the user's function; None for the task's own."""
        target = self.score.target
        return load_object(target, "score.target") if target is not None and ":" in target else target

    def training_facts(self) -> dict[str, Any]:
        """The part that decides the trajectory."""
        facts = self.model_dump(mode="json", include={"seed", "device", "threads", "model", "data", "task", "loss", "train"})
        if self.task is None:
            del facts["task"]  # recordings that are older than this key stay what they were
        if self.data is not None:
            del facts["data"]["path"]  # the samples themselves are among what a recording is made from
        if not self.train.drop_last:
            del facts["train"]["drop_last"]  # recordings that are older than this key stay what they were
        return facts

    def save(self, path: Path) -> None:
        """Writes the resolved recipe: every value, defaults included.

        Raises:
            UsageError: a recipe of the user's own lies there.
        """
        self.may_save(path)
        checkpoint.write_text(path, RESOLVED + to_yaml(self.model_dump()))

    @staticmethod
    def may_save(path: Path) -> None:
        """Raises UsageError when a file that prunekit did not write lies at ``path``."""
        try:
            ours = not path.exists() or path.read_text(encoding="utf-8", errors="replace").startswith(RESOLVED)
        except OSError:
            ours = False
        if not ours:
            raise UsageError(f"{path}: is not a recipe that prunekit wrote and would be replaced; choose another --out")

    @classmethod
    def load(cls, path: str | Path, resolved: bool = False) -> Recipe:
        """Reads a recipe.

        Args:
            resolved: it was written by ``save``, so a missing key means that the file is not whole.

        Raises:
            UsageError: missing, not YAML, or values out of range; one line a fault, with the path of its key.
        """
        path = Path(path)
        content = read_yaml(path)
        recipe = cls.of(content, path)
        if resolved:
            lost = [key for key in cls.model_fields if key not in content and key != "task"]
            if lost:
                raise UsageError(f"{path}: not whole, it lacks {', '.join(lost)}; run train or import again")
        return recipe

    @classmethod
    def of(cls, content: dict[str, Any], source: str | Path) -> Recipe:
        """Checks values that come from ``source`` (named in the message).

        Raises:
            UsageError: one clause a fault, with the path of its key.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UsageError(_faults(source, error.errors())) from None


def parse_bytes(text: str) -> int:
    """``"512MiB"``, ``"2GB"``, ``"800000"`` -> bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write for example 512MiB or 2GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def parse_seconds(text: str) -> float:
    """``"60s"``, ``"5m"``, ``"1.5h"``, ``"90"`` -> seconds. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no length of time; write for example 60s or 5m")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2].lower()]


def check_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or that this machine lacks."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
            raise RuntimeError("use cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


KIND = re.compile(r"(str|int|float|bool|list|dict|tuple|literal|constrained-\w+)(\[.*\])?")
"""What pydantic puts into the place of a fault where a value may be of several kinds."""
SHAPES = {
    "dict_type": "a mapping of names to values is wanted here",
    "model_type": "a section of keys and values is wanted here",
    "list_type": "a list is wanted here, [ONE, TWO]",
    "tuple_type": "a list is wanted here, [ONE, TWO]",
}
"""What a recipe's author is told of a value of another shape, by pydantic's kind of fault."""


def _faults(path: str | Path, faults: Sequence[Any], model: type[BaseModel] | None = None) -> str:
    """Every fault, those of one value's several kinds (text or a mapping, say) in one."""
    told: dict[str, str] = {}
    for fault in faults:
        loc = tuple(part for part in fault["loc"] if not (isinstance(part, str) and KIND.fullmatch(part)))
        text = _fault(path, {**fault, "loc": loc}, model)
        key = ".".join(map(str, loc))
        told[key] = f"{told[key]}, or {text.rsplit(': ', 1)[1]}" if key in told else text
    return "; ".join(told.values())


def _fault(path: str | Path, fault: Any, model: type[BaseModel] | None = None) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *parents, last = fault["loc"]
        known = _fields_at(parents, model or Recipe)
        return f"{path}: {key} is not a recipe key; {nearest(str(last), known)}"
    message = SHAPES.get(fault["type"]) or fault["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if fault["type"] == "missing":
        return f"{path}: {key} is missing"
    if not key:
        return f"{path}: {message}"
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        message = "this is text; write it in quotes"
    shown = repr(fault["input"])
    return f"{path}: {key} is {shown if len(shown) < 80 else shown[:77] + '...'}: {message[0].lower()}{message[1:]}"


def _fields_at(parents: list[Any], model: Any) -> list[str]:
    for part in parents:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        model = next(a for a in nested if isinstance(a, type) and issubclass(a, BaseModel))
    return list(model.model_fields)


__all__ = ["Recipe", "check_device"]
