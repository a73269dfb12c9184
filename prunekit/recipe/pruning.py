"""Sections of a recipe on what is pruned: how much, by what, in which steps, repaired how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from prunekit.errors import UsageError
from prunekit.imports import load_object
from prunekit.plan import GROUPED, asked_sparsity, check_allocation
from prunekit.recipe.faults import Misfit
from prunekit.recipe.layerwise import GOES_WITH, Layerwise, check_layerwise
from prunekit.recipe.training import Finetune
from prunekit.recipe.values import (
    AllocationName,
    Count,
    Large,
    Positive,
    Section,
    Share,
    StructureName,
    Tokens,
    Whole,
    criterion_name,
    known,
    one_of,
    parse_seconds,
    without_unset,
)
from prunekit.repair.objective import STREAMED
from prunekit.repair.streamed import Streaming, usual_rates
from prunekit.steps.schedule import SCHEDULES, SPACINGS, check_again, check_steps
from prunekit.structure import implied_sparsity, takes_sizes

TIMES = ("max_latency_ms", "speedup")
"""Budgets of measured time."""
SIZED = ("max_macs", "max_bytes", *TIMES)
"""Budgets that follow from every tensor's size."""
BUDGETS = ("max_params", *SIZED, "max_accuracy_drop", "max_drop")
DROPS = ("max_accuracy_drop", "max_drop")
"""Budgets of what the task's first measure may lose on validation data."""


class PruneSchedule(Section):
    """See ``prunekit.search.Schedule``."""

    name: Annotated[str, one_of(SCHEDULES, "schedule")] = "one-shot"
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    spacing: Annotated[str, one_of(SPACINGS, "spacing")] = "geometric"
    every: Count | None = None


class Steps(Whole):
    """How pruning goes on: in which steps, with what training, from which weights."""

    schedule: PruneSchedule = PruneSchedule()
    finetune: Finetune | None = None
    recalibrate: bool = False
    rewind: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Steps:
        if self.schedule.every is not None and self.schedule.name != "gradual":
            raise Misfit(
                f"every is about schedule gradual, not {self.schedule.name}",
                "--every is about pruning while training; give --schedule gradual",
            )
        if self.schedule.name == "gradual" and self.finetune is None:
            raise ValueError("schedule gradual prunes while it fine-tunes; give finetune (--finetune EPOCHS)")
        if self.rewind is not None:
            if self.schedule.name == "gradual":
                raise ValueError("rewind goes with schedule one-shot or iterative")
            given = [
                k
                for k in ("lr", "optimizer", "schedule", "seed", "lora")
                if self.finetune and getattr(self.finetune, k) is not None
            ]
            if given:
                as_before = "rewind trains on as the dense training did"
                raise Misfit(f"{as_before}; leave out finetune.{given[0]}", f"--{as_before}; leave --{given[0]} out")
        return self

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

    def as_options(self) -> list[str]:
        """The options of ``prune`` that say what is done with the weights once a plan is made."""
        tuned = self.finetune
        given = {
            "--finetune": tuned is not None and tuned.tokens is None,
            "--tune-tokens": tuned is not None and tuned.tokens is not None,
            "--rewind": self.rewind is not None,
            "--recalibrate": self.recalibrate,
        }
        return [option for option, asked in given.items() if asked]


TRY_FOR = "60s"
"""How long criterion auto tries to refine by itself."""


class Stream(Section):
    """Learn a mask from a stream of training samples; see ``prunekit.repair.streamed.Streaming``.

    ``tokens``: to learn from in all, such as ``500k`` (without tokens, samples); ``batch``: samples a step; ``rate``: at first,
    it falls to 0; null: of single weights 5.8, of N:M 11.5, over the number of a layer's inputs, of units 0.06; ``looks``: how
    often the scoring samples judge; ``soft``: masks are soft at first, null: where a quarter or more stays; ``lean``: 10 bytes
    a weight beside the model, for 16; ``autocast``: compute in bfloat16, ``reference``: the dense model alone;
    ``checkpointing``: run blocks again instead of keeping their activations.
    """

    tokens: Tokens
    batch: Count = Streaming.batch
    rate: Positive | None = Streaming.rate
    looks: Count = Streaming.looks
    soft: bool | None = Streaming.soft
    lean: bool = Streaming.lean
    autocast: bool | Literal["reference"] = Streaming.autocast
    checkpointing: bool = Streaming.checkpointing

    def request(self) -> dict[str, Any]:
        """What decides what is learnt, for reuse: as it is written, and what prunekit takes for a rate that is not."""
        full = {"divergences": "float32"} if self.autocast is True else {}  # they were bfloat16 once
        return {**self.model_dump(mode="json"), **full, **({"rates": usual_rates()} if self.rate is None else {})}


BESIDE_TOKENS = ("refine", "rewind", "recalibrate", "compensate", "squeeze", "layerwise")
"""What a budget of tokens leaves nothing to say for."""
OPTIONS = {"refine": "--refine and --refine-tokens", "epochs": "--finetune", "tokens": "--tune-tokens"}
"""Keys whose options have other names."""
KEPT = ("rounds", "patience", "learn", "steps", "samples")
"""Keys of samples that are kept and looked at again."""


class Refinement(Section):
    """How a plan is repaired by the blame of what it removed (docs/refine.md).

    ``learn``: learn a mask for ``steps`` steps first; ``rounds``: of swaps, at most; ``patience``: rounds of few swaps
    that may gain less than 1 % together before the search ends, null for all rounds; ``budget``: stop after so long, such as
    ``60s`` or ``5m``; ``target``: what is lowered, ``kl`` (to the dense model), ``loss``, or ``module:function``; ``samples``:
    the most training samples to learn from; the scoring samples accept. ``stream``: learn a mask from a stream of all training
    samples instead, and no more; its target may be ``hidden`` (states) too.
    """

    rounds: Annotated[int, Field(ge=0, le=10**6)] = 30
    patience: Count | None = 6
    learn: bool = True
    steps: Count = 300
    budget: str | None = None
    target: str = "kl"
    samples: Count = 1000
    stream: Stream | None = None

    _said = without_unset("stream")

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return value if ":" in value else known(value, STREAMED, "target")

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream is None and self.target == "hidden":
            raise ValueError("target hidden goes with stream")
        given = [key for key in KEPT if self.stream is not None and getattr(self, key) != type(self).model_fields[key].default]
        if given:
            raise ValueError(f"{given[0]} is for samples that are kept, and stream learns from fresh ones; leave one of them out")
        return self

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            parse_seconds(value)
        return value

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``prunekit.refine`` that these keys set."""
        return {
            "rounds": self.rounds, "patience": self.patience, "learn": self.learn, "steps": self.steps,
            "budget_seconds": None if self.budget is None else parse_seconds(self.budget),
            "target": load_object(self.target, "refine.target") if ":" in self.target else self.target,
            "stream": None if self.stream is None else Streaming(**self.stream.model_dump()),
        }  # fmt: skip


class Refine(Refinement):
    """``when``: ``always``; ``better``: only if the pruned model is better for it on validation data; ``never``. ``true`` and

    ``false`` are short for the first and the last. ``again``: how many times more after fine-tuning, each followed by as much
    fine-tuning (docs/schedules.md).
    """

    when: Literal["always", "better", "never"] = "always"
    again: Annotated[int, Field(ge=0, le=1000)] = 0

    @model_validator(mode="after")
    def _whole(self) -> Refine:
        if self.again and self.when != "always":
            raise Misfit(
                f"again goes with when: always, not {self.when}: what comes back is not tried, but trained",
                "--refine-again with --no-refine: leave one of them out",
            )
        return self


class CompareRefine(Refinement):
    """``sparsities``: at which of the compared ones the best plan is refined too; null: at all."""

    sparsities: list[Share] | None = None


class Prune(Steps):
    """One pruned model.

    ``criterion``: a name, or ``auto``: the criterion and allocation that do best on validation data there; ``tempered(...)`` is
    the best of what it stands for. ``sparsity``: share to remove; N:M says it itself, and a budget (one of ``max_…``: parameters,
    MACs, bytes, measured milliseconds, points of validation accuracy, or ``max_drop``: what the task's first measure may lose
    there, in its unit; or ``speedup``: how many times as fast as the dense model, measured beside it) finds it.
    ``allocation``: null leaves the choice to
    ``auto`` (among the recipe's), else means ``global``. ``ratios``, ``floor``, ``round_to`` and
    ``min_units`` (null for those of ``structure``), ``uniform``: see ``make_plan``. ``compensate``: kept weights
    make up for removed ones, computed from training samples and judged on the scoring samples.
    ``layerwise``: mask and weights are found layer by layer instead of by scores; a method's name, or a section. A
    ``criterion`` beside it says how much of each layer goes; by ``auto`` all lose the same share. With ``refine`` its mask is
    where refining begins, whose weights are the dense model's. With ``finetune`` training begins from the new weights, as it
    does with ``compensate``.
    ``tokens``: a budget of training tokens, such as ``900k``, for a mask learnt from a stream and weights that go with it, by
    the divergence from the dense model; short tries on validation data say whether together.
    ``refine``: repair the plan before anything else happens,
    in a schedule every round's plan; null lets ``auto`` try it, for ``TRY_FOR`` at most, where it makes one plan that is not
    fine-tuned. ``squeeze``:
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
    uniform: bool = False
    compensate: bool = False
    layerwise: Layerwise | None = None
    tokens: Tokens | None = None
    refine: Refine | None = None
    squeeze: bool = False
    classes: list[Annotated[int, Field(ge=0, le=10**6)]] = []
    max_params: Large | None = None
    max_macs: Large | None = None
    max_bytes: Large | None = None
    max_latency_ms: Positive | None = None
    speedup: Annotated[float, Field(ge=1, le=10**6, allow_inf_nan=False)] | None = None
    max_accuracy_drop: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    _said = without_unset("layerwise", "tokens")

    @field_validator("criterion")
    @classmethod
    def _named(cls, value: str) -> str:
        return value if value == "auto" else criterion_name(value)

    @field_validator("refine", mode="before")
    @classmethod
    def _refine(cls, value: Any) -> Any:
        return {"when": "always" if value else "never"} if isinstance(value, bool) else value

    @field_validator("layerwise", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _by_layers(self) -> Prune:
        if self.layerwise is not None:
            fields = type(self).model_fields
            others = {
                key: value
                for key in fields
                if key not in GOES_WITH and (value := getattr(self, key)) != fields[key].get_default(call_default_factory=True)
            }
            when = "never" if self.refine is None else self.refine.when
            again = 0 if self.refine is None else self.refine.again
            check_layerwise(self.layerwise, self.structure, self.sparsity, self.criterion, self.allocation, others, when, again)
        return self

    @model_validator(mode="after")
    def _divided(self) -> Prune:
        if self.tokens is None:
            return self
        given = [key for key in (*BUDGETS, *BESIDE_TOKENS) if getattr(self, key) not in (None, False)]
        if self.schedule.name != "one-shot":
            given.append("schedule")
        if self.finetune is not None:
            given += [key for key in ("epochs", "tokens") if getattr(self.finetune, key) is not None]
        if given:
            raise Misfit(
                f"tokens says itself how long a mask is learnt and weights are tuned, of a given sparsity; leave {given[0]} out",
                "--tokens says itself how long a mask is learnt and weights are tuned, of a given sparsity; leave "
                f"{OPTIONS.get(given[0], '--' + given[0].replace('_', '-'))} out",
            )
        return self

    @model_validator(mode="after")
    def _repairable(self) -> Prune:
        if self.squeeze and self.structure in GROUPED:
            raise ValueError(f"squeeze is for plans of masks; {self.structure} are cut out as they are")
        for key in ("round_to", "min_units"):
            if getattr(self, key) is not None and (
                self.structure not in GROUPED or (GROUPED.is_own(self.structure) and not takes_sizes(self.structure))
            ):
                raise ValueError(f"{key} is for channels and heads, and the structure is {self.structure}")
        if self.uniform and (
            self.structure not in GROUPED or (GROUPED.is_own(self.structure) and not takes_sizes(self.structure))
        ):
            raise ValueError(f"uniform is for channels, heads, neurons and experts, and the structure is {self.structure}")
        if self.uniform and self.ratios:
            raise ValueError("uniform keeps as many units in every layer, and ratios say another share; leave one of them out")
        if self.squeeze and self.request():
            raise ValueError("squeeze is for pruning at once; leave out schedule, finetune, rewind and recalibrate")
        try:
            check_steps(self.structure, self.schedule.name)
            if self.refine is not None and self.refine.again:
                check_again(self.schedule.name, self.finetune is not None, self.rewind is not None)
                for key in DROPS:
                    if getattr(self, key) is not None:
                        raise UsageError(f"refining again is for a given size; with {key} every try would train so often")
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def repair(self) -> Refine | None:
        """The refinement that is asked for, or that auto tries unasked where one plan is made and not trained; None for none."""
        if self.refine is not None:
            return None if self.refine.when == "never" else self.refine
        if self.layerwise is not None or self.tokens is not None:
            return None
        trained = self.finetune is not None or self.rewind is not None  # which closes the gap between masks
        searched = any(getattr(self, key) is not None for key in DROPS)
        tries = self.criterion == "auto" and self.schedule.name == "one-shot" and not trained and not searched
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
    def _timed(self) -> Prune:
        name, value = self.budget
        if name in SIZED and self.structure not in GROUPED:
            saved = "save no time" if name in TIMES else "make nothing smaller"
            raise ValueError(
                f"{name} is {value:g}, and the structure is {self.structure}: masks {saved} in dense kernels; take structure "
                "channels, heads or layers"
            )
        return self

    @model_validator(mode="after")
    def _sparsity(self) -> Prune:
        given = [name for name in ("sparsity", *BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are given; one of them decides how much goes")
        if self.compensate and (self.schedule.name != "one-shot" or self.rewind is not None or self.recalibrate):
            raise ValueError("compensate is for pruning at once; leave out schedule, rewind and recalibrate")
        if self.allocation is not None and implied_sparsity(self.structure) is not None:
            raise ValueError(f"{self.structure} keeps the same share everywhere; leave allocation out")
        try:
            if self.allocation is not None:
                check_allocation(self.allocation, self.structure)
            if self.budget[0] and implied_sparsity(self.structure) is None:
                return self
            if self.budget[0]:
                raise ValueError(f"{self.structure} removes a fixed share; leave {self.budget[0]} out")
            asked_sparsity(self.structure, self.sparsity)
        except UsageError as error:
            if not given:
                needed = "prune needs --sparsity, a budget such as --max-params, or --apply PLAN"
                raise Misfit(str(error), needed) from None
            raise ValueError(str(error)) from None
        return self
