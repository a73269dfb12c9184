"""A study: a comparison over cases and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from prunekit.errors import UsageError
from prunekit.recipe.pruning import Stream
from prunekit.recipe.values import (
    AllocationName,
    Count,
    CriterionName,
    Section,
    Share,
    StructureName,
    Whole,
    switched,
    without_unset,
)
from prunekit.recipe.yaml_file import read_yaml
from prunekit.search.streamed_ways import LOOKING, REFIT, WAYS
from prunekit.search.ways import get_repair

BY_LAYERS: Final = "layers"


Method = CriterionName | Literal["auto"]
Shares = Annotated[list[Share], Field(min_length=1)]
Ways = Annotated[list[str | Annotated[dict[str, Shares], Field(min_length=1)]], Field(min_length=1)]
"""Names; ``{name: [0.7, 0.9]}`` one that is measured at these sparsities alone."""
Allocations = Annotated[list[AllocationName], Field(min_length=1)]


class Tuning(Section):
    """After how much fine-tuning a study compares, and at which sparsities.

    The dense model is trained on for as many epochs too: what a criterion loses is told from what more training gives.
    """

    epochs: Count = 10
    sparsities: dict[StructureName, list[Share]] = {}


def _each(ways: Sequence[str | dict[str, list[float]]]) -> Iterator[tuple[str, list[float] | None]]:
    for way in ways:
        yield from [(way, None)] if isinstance(way, str) else way.items()


class Repairs(Section):
    """Masks repaired, and other ways to masks of that size (``prunekit.search.ways``); ``refine: true`` takes the defaults.

    ``ways``: by structure, the rest takes ``refined``; ``of``: methods whose plans are repaired, or in which ways
    by method, a way ``{tuned: [0.7, 0.9]}`` at these sparsities alone; ``auto`` among them: at every sparsity the plan that does
    best on validation data; null: those that are looked at again; ``sparsities``: by structure, null: those of ``tune``;
    ``samples``: of the training data, to learn from, accepted on the scoring samples; null: a quarter of the scoring samples
    accepts, the rest is learnt from; ``stream``: how ways learn that take fresh training samples in every step, and from how many
    tokens; ``compensate``: also with their weights compensated; ``tune``: the ways that are compared after fine-tuning too, where
    ``tune`` of the study says; ``again``: refined plans also refined so many times again within that fine-tuning, its epochs
    split into ``again + 1`` runs (``refined again``).
    """

    ways: dict[StructureName, list[str]] = {}
    of: dict[StructureName, list[Method] | Annotated[dict[Method, Ways], Field(min_length=1)]] = {}
    sparsities: dict[StructureName, list[Share]] | None = None
    samples: Count | None = None
    stream: Stream | None = None
    compensate: bool = True
    tune: list[str] = []
    again: Annotated[int, Field(ge=0, le=1000)] = 0

    _said = without_unset("stream")

    def own_ways(self, structure: str) -> dict[str, list[tuple[str, list[float] | None]]]:
        """By method, where ``of`` says them, ways and at which sparsities; None: at all."""
        of = self.of.get(structure, ())
        return {method: list(_each(ways)) for method, ways in of.items()} if isinstance(of, dict) else {}

    def ways_of(self, structure: str) -> list[str]:
        """All of them."""
        if own := self.own_ways(structure):
            return list(dict.fromkeys(way for ways in own.values() for way, _ in ways))
        return self.ways.get(structure, ["refined"])

    @model_validator(mode="after")
    def _fed(self) -> Repairs:
        for way in (way for structure in [*self.ways, *self.of] for way in self.ways_of(structure)):
            if way in WAYS and way not in {*LOOKING, REFIT} and self.stream is None:
                raise ValueError(f"way {way} learns from a stream of tokens; give stream (tokens)")
        return self

    @model_validator(mode="after")
    def _tuned(self) -> Repairs:
        if self.again and "refined" not in self.tune:
            raise ValueError("refine.again compares after fine-tuning; name refined in refine.tune too")
        return self

    @model_validator(mode="after")
    def _known(self) -> Repairs:
        for structure in self.ways:
            if self.own_ways(structure):
                raise ValueError(f"refine.of says the ways of {structure} by method; leave it out of refine.ways")
        try:
            for structure in dict.fromkeys([*self.ways, *self.of]):
                for way in self.ways_of(structure):
                    get_repair(way, structure)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self


class Study(Whole):
    """A comparison over cases and seeds: ``prunekit compare STUDY --out DIR``.

    ``cases``: name -> recipe, its path relative to the study's file; ``criteria``: each one line of the result, ``tempered(...)``
    the best of the compositions that it stands for on validation data; ``allocations``: by structure, of all criteria or by
    criterion, the best on validation data is taken; ``control``: also plans shuffled within layers;
    ``samples``: scoring samples. Every criterion is compared again with its weights compensated (``compensate``; ``layers``: by
    every layer's outputs alone), after fine-tuning (``tune``), and with its plans repaired (``refine``). ``leading``: only so
    many, those that lead on validation data in that run, and those in ``always``; means over the seeds where a criterion led are
    means over its luckier seeds.
    """

    what: ClassVar[str] = "study"

    cases: Annotated[dict[str, str], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0, 1, 2]
    criteria: Annotated[list[CriterionName], Field(min_length=1)]
    structures: Annotated[dict[StructureName, Annotated[list[Share], Field(min_length=1)]], Field(min_length=1)]
    allocations: dict[StructureName, Allocations | Annotated[dict[CriterionName, Allocations], Field(min_length=1)]] = {}
    control: bool = True
    samples: Count = 160
    leading: Annotated[int, Field(ge=0)] | None = None
    always: list[CriterionName] = ["magnitude", "random"]
    compensate: bool | Literal["layers"] = False
    tune: Tuning | None = None
    refine: Annotated[Repairs | None, BeforeValidator(switched)] = None

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
    def _allotted(self) -> Study:
        known = {*self.criteria, *self.always}
        for name in (name for said in self.allocations.values() if isinstance(said, dict) for name in said):
            if name not in known:
                raise ValueError(f"allocations names {name}, which is none of the criteria compared")
        return self

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
            own, refined = refine.own_ways(structure), self.refined_at(structure)
            said = [refine.ways.get(structure, []), *([way for way, _ in ways] for ways in own.values())]
            if any(len(set(ways)) < len(ways) for ways in said):
                raise ValueError(f"refine.{'of' if own else 'ways'} of {structure} names a way twice")
            for way, sparsities in (told for ways in own.values() for told in ways):
                if outside := sorted(set(sparsities or ()) - set(refined)):
                    raise ValueError(f"refine.of has {way} at {outside[0]:g}, where nothing of {structure} is repaired")
            extra = sorted(set(refined) - set(compared))
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

    def ways_of(self, structure: str, method: str | None = None, sparsity: float | None = None) -> list[str]:
        """How its plans are repaired; one method's, or None for all; there, or None for anywhere."""
        if self.refine is None:
            return []
        own = self.refine.own_ways(structure).get(method or "")
        if own is None:
            return list(self.refine.ways_of(structure))
        return [way for way, at in own if None in (at, sparsity) or sparsity in (at or ())]

    def refined_again_at(self, structure: str, method: str) -> list[float]:
        """Sparsities at which what was refined and fine-tuned of a method's plans is refined again."""
        if self.refine is None or not self.refine.again:
            return []
        both = [s for s in self.refined_at(structure) if s in self.tuned_at(structure)]
        return [s for s in both if "refined" in self.ways_of(structure, method, s)]

    @property
    def looked_at_again(self) -> int:
        """How many criteria are compensated, fine-tuned and repaired, at most."""
        return len(self.criteria) if self.leading is None else self.leading + len(self.always)

    @property
    def fine_tunes(self) -> bool:
        """Whether any plan is fine-tuned, and the dense model therefore too."""
        return any(self.tuned_at(structure) for structure in self.structures)

    def tuned_at(self, structure: str) -> list[float]:
        """Sparsities at which plans are fine-tuned."""
        return [] if self.tune is None else list(self.tune.sparsities.get(structure, ()))

    def allocations_of(self, structure: str, criterion: str) -> list[str]:
        """How a criterion's plans share out what is removed among layers."""
        said = self.allocations.get(structure, [])
        return list((said.get(criterion, []) if isinstance(said, dict) else said) or ["global", "uniform", "mean"])

    @classmethod
    def load(cls, path: Path) -> Study:
        """Reads a study.

        Raises:
            UsageError: as ``Recipe.load``; recipes are looked for when they are trained.
        """
        return cls.of(read_yaml(path), path)
