"""Kinds of values that a recipe holds, each checked as it is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from prunekit import ranks
from prunekit.criteria import expand
from prunekit.errors import UsageError, nearest, quoted
from prunekit.imports import IMPORT_PATH
from prunekit.kernel import RULES
from prunekit.plan import ALLOCATIONS, check_structure
from prunekit.recipe.faults import faults_told, misfit_of
from prunekit.registry import Registry

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Large = Annotated[int, Field(ge=1, le=10**15)]
Nodes = Annotated[int, Field(ge=1, le=10**4)]
Positive = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]


class Section(BaseModel):
    """Values of a recipe; ``what`` the whole is called in messages."""

    what: ClassVar[str] = "recipe"
    model_config = ConfigDict(extra="forbid", frozen=True)


class Whole(Section):
    """What is read by itself: a recipe, a study, the options of a command."""

    @classmethod
    def of(cls, content: dict[str, Any], source: str | Path, *, option: Callable[[str], str] | None = None) -> Self:
        """Checks values that come from ``source`` (named in the message).

        Args:
            option: a key's path -> the option that the user gave its value by, which messages then name.

        Raises:
            UsageError: one clause a fault, with the path of its key.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            if option and (misfit := misfit_of(error.errors())) is not None:
                raise UsageError(misfit.options) from None
            raise UsageError(faults_told(source, error.errors(), cls, cls.what, option)) from None


def known(value: str, names: Any, what: str) -> str:
    """``value``, if it is one of ``names``; raises ValueError else."""
    if value not in names:
        every = names.names() if isinstance(names, Registry) else list(names)
        raise ValueError(f"{what} {value!r} does not exist; {nearest(value, every)}")
    return value


def one_of(names: Any, what: str) -> AfterValidator:
    """A check that a value is one of ``names``."""
    return AfterValidator(lambda value: known(value, names, what))


def criterion_name(value: str) -> str:
    """Checked and, unless it stands for several, in its canonical form."""
    try:
        names = expand(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return names[0] if len(names) == 1 else value


def structure_name(value: str) -> str:
    try:
        check_structure(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


def import_path(value: str) -> str:
    """``value``, if it looks like ``package.module:name``; nothing is imported. Raises ValueError else."""
    if re.fullmatch(IMPORT_PATH, value) is None:
        raise ValueError("it must look like package.module:name")
    return value


def switched(value: Any) -> Any:
    """A section that ``true`` turns on with its defaults, and ``false`` off."""
    return {} if value is True else None if value is False else value


def without_unset(*keys: str) -> Any:
    """A serializer that leaves these keys out where they are None: what was written before they existed is still the same."""

    def said(self: Any, every: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in every(self).items() if key not in keys or value is not None}

    return model_serializer(mode="wrap")(said)


CriterionName = Annotated[str, AfterValidator(criterion_name)]
AllocationName = Annotated[str, one_of(ALLOCATIONS, "allocation")]
StructureName = Annotated[str, AfterValidator(structure_name)]
ImportPath = Annotated[str, AfterValidator(import_path)]
RuleName = Annotated[str, one_of(RULES, "quadrature rule")]


def parse_bytes(text: str) -> int:
    """``"512MiB"``, ``"2GB"``, ``"800000"`` -> bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write for example 512MiB or 2GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def parse_count(value: Any) -> Any:
    """``"500k"``, ``"1.5M"``, ``"64000"``, ``"1e5"`` -> a number; other things than texts as they are.

    Raises:
        ValueError: another text.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?(?:e\d)?)\s*([kmg]?)\s*", value, re.IGNORECASE)
    number = float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2].lower()] if match else 0.5
    if number != int(number):
        raise ValueError(f"{value!r} is no number of tokens; write for example 500k or 1.5M")
    return int(number)


Tokens = Annotated[Large, BeforeValidator(parse_count)]
"""A number of tokens, or a text such as ``500k``."""


def parse_seconds(text: str) -> float:
    """``"60s"``, ``"5m"``, ``"1.5h"``, ``"90"`` -> seconds. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([smh]?)\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no length of time; write for example 60s or 5m")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2].lower()]


def check_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or that this machine lacks."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
            raise RuntimeError("use cpu, cuda or cuda:N")
        if device.type == "cuda" and device.index is None and ranks.size() > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # each rank of a machine its own
        if device.type == "mps" and ranks.size() > 1:
            raise RuntimeError("several processes share cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({quoted(error)})") from None
    return device
