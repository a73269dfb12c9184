"""What a recipe says: the YAML schema, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.criteria import AGGREGATIONS, CRITERIA
from prunekit.errors import UsageError, nearest
from prunekit.imports import call, load_object
from prunekit.kernel import RULES, SHARES, TARGETS
from prunekit.plan import ALLOCATIONS, STRUCTURES
from prunekit.search.objective import OBJECTIVES

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Nodes = Annotated[int, Field(ge=1, le=10**4)]
Positive = Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)]
RESOLVED = "# The resolved recipe of this run: every value, defaults included.\n"
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": F.cross_entropy}


def _known(value: str, known: Any, what: str) -> str:
    if value not in known:
        raise ValueError(f"{what} {value!r} does not exist; {nearest(value, list(known))}")
    return value


def _one_of(known: Any, what: str) -> AfterValidator:
    return AfterValidator(lambda value: _known(value, known, what))


CriterionName = Annotated[str, _one_of(CRITERIA, "criterion")]
AllocationName = Annotated[str, _one_of(ALLOCATIONS, "allocation")]
StructureName = Annotated[str, _one_of(STRUCTURES, "structure")]
RuleName = Annotated[str, _one_of(RULES, "quadrature rule")]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: the first would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Factory(_Section):
    """``factory``: import path ``module:function``; ``args``: its keyword arguments."""

    factory: str
    args: dict[str, Any] = {}


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
    """``onecycle`` rises to the optimizer's lr over ``warmup`` of the steps and falls to near 0."""

    name: Literal["onecycle", "cosine", "constant"] = "onecycle"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.2


class Record(_Section):
    """What the recorder keeps: see ``prunekit.Recorder``."""

    every: Count = 1
    states: Literal["whole", "half"] = "whole"
    second_moments: bool = False
    snapshot_every: Annotated[int, Field(ge=0)] = 100


class Train(_Section):
    record: Record = Record()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: Count = 20
    batch_size: Count = 64


class Prunable(_Section):
    """``ignore``: shell-style patterns of parameter names that may not be pruned."""

    ignore: list[str] = []


class Score(_Section):
    """``samples``: at most so many scoring samples. The rest says how influence looks at the path (docs/kernel.md):

    ``quadrature: ranking`` takes a fixed ``rule`` with ``nodes``, enough to rank weights; ``reconstruction`` halves steps
    until every sample's sum over one is within ``tolerance``. ``memory`` holds the scores in work.
    """

    criteria: Annotated[list[CriterionName], Field(min_length=1)] = list(CRITERIA)
    target: str = "outputs"
    samples: Count = 160
    share: Annotated[str, _one_of(SHARES, "share")] = "kernel"
    aggregation: Annotated[str, _one_of(AGGREGATIONS, "aggregation")] = "l1"
    quadrature: Literal["ranking", "reconstruction"] = "ranking"
    rule: RuleName = "midpoint"
    nodes: Nodes = 1
    tolerance: Positive = 0.01
    stride: Count = 1
    phase: tuple[int, int] | None = None
    memory: str = "512MiB"

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        parse_bytes(value)
        return value

    def options(self) -> dict[str, Any]:
        """The fields of ``Evidence`` that these keys set."""
        return {
            "share": self.share, "aggregation": self.aggregation, "rule": self.rule, "nodes": self.nodes,
            "tolerance": self.tolerance if self.quadrature == "reconstruction" else None,
            "stride": self.stride, "phase": self.phase, "memory": parse_bytes(self.memory),
        }  # fmt: skip

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        return value if ":" in value else _known(value, TARGETS, "target")


class Compare(_Section):
    structures: Annotated[list[StructureName], Field(min_length=1)] = ["unstructured", "channels"]
    allocations: Annotated[list[AllocationName], Field(min_length=1)] = list(ALLOCATIONS)
    sparsities: Annotated[list[Share], Field(min_length=1)] = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]


class Refine(_Section):
    """Repair of the plan by the blame of what it removed (docs/refine.md). ``refine: true`` takes these defaults.

    ``rounds``: of swaps, at most; ``learn``: then learn a mask for ``steps`` steps; ``budget``: stop after so long, such
    as ``60s`` or ``5m``; ``target``: what is lowered, ``kl`` (to the dense model), ``loss``, or ``module:function``;
    ``samples``: at most so many scoring samples.
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


class Prune(_Section):
    """``squeeze``: take out the channels that an unstructured mask left without inputs or readers."""

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    criterion: str = "auto"
    sparsity: Share
    structure: StructureName = "unstructured"
    allocation: AllocationName | None = None
    refine: Refine | None = None
    squeeze: bool = False

    @field_validator("refine", mode="before")
    @classmethod
    def _refine(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _squeezable(self) -> Prune:
        if self.squeeze and self.structure == "channels":
            raise ValueError("squeeze is for unstructured plans; channels are cut out as they are")
        return self

    @field_validator("criterion")
    @classmethod
    def _criterion(cls, value: str) -> str:
        return value if value == "auto" else _known(value, CRITERIA, "criterion")


class Eval(_Section):
    """``samples``: test samples whose outputs the kernel rebuilds; ``tolerance``: allowed error per sample and step,

    reached by halving; ``nodes``: a fixed number of nodes a step by ``rule`` instead (the pruning step keeps its
    tolerance); ``stride``: kept states a piece.
    """

    samples: Count = 128
    tolerance: Positive = 0.01
    nodes: Nodes | None = None
    rule: RuleName = "midpoint"
    stride: Count = 1
    latency_batches: list[Count] = [1, 64]


class Recipe(_Section):
    """A whole run. Keys that are not here are refused.

    ``threads``: that torch computes with; null leaves it to torch. Small models are as fast with one, and keep their
    speed when other programs want the processor too.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    model: Factory
    data: Factory | None = None
    loss: str = "cross_entropy"
    train: Train = Train()
    prunable: Prunable = Prunable()
    score: Score = Score()
    compare: Compare = Compare()
    prune: list[Prune] = []
    eval: Eval = Eval()

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        return value if ":" in value else _known(value, LOSSES, "loss")

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
        o = self.train.optimizer
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if o.name == "sgd":
            optimizer = torch.optim.SGD(parameters, o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay)
        else:
            kind = torch.optim.AdamW if o.name == "adamw" else torch.optim.Adam
            optimizer = kind(parameters, o.lr, betas=o.betas, weight_decay=o.weight_decay)
        schedule = self.train.schedule
        if schedule.name == "onecycle":
            return optimizer, torch.optim.lr_scheduler.OneCycleLR(
                optimizer, o.lr, total_steps=steps, pct_start=schedule.warmup, cycle_momentum=False
            )
        if schedule.name == "cosine":
            return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return optimizer, None

    def load_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The mean loss ``(outputs, labels) -> scalar``."""
        if self.loss in LOSSES:
            return LOSSES[self.loss]
        found: Callable[[Tensor, Tensor], Tensor] = load_object(self.loss, "loss")
        return found

    def load_target(self) -> Any:
        """A target's name, or the user's function."""
        return load_object(self.score.target, "score.target") if ":" in self.score.target else self.score.target

    def training_facts(self) -> dict[str, Any]:
        """The part that decides the trajectory."""
        return self.model_dump(mode="json", include={"seed", "device", "threads", "model", "data", "loss", "train"})

    def save(self, path: Path) -> None:
        """Writes the resolved recipe: every value, defaults included.

        Raises:
            UsageError: a recipe of the user's own lies there.
        """
        self.may_save(path)
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        with checkpoint.replacing(path) as temporary:
            temporary.write_text(RESOLVED + text, encoding="utf-8")

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
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
        except FileNotFoundError:
            raise UsageError(f"{path}: no such recipe") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read ({error})") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise UsageError(f"{path}: a recipe is a mapping of keys, this is a {type(content).__name__}")
        recipe = cls.of(content, path)
        if resolved:
            lost = [key for key in cls.model_fields if key not in content]
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
            raise UsageError("; ".join(_fault(source, fault) for fault in error.errors())) from None


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


def _fault(path: str | Path, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *parents, last = fault["loc"]
        known = _fields_at(parents)
        return f"{path}: {key} is not a recipe key; {nearest(str(last), known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{path}: {key} is missing"
    shown = repr(fault["input"])
    return f"{path}: {key} is {shown if len(shown) < 80 else shown[:77] + '...'}: {message[0].lower()}{message[1:]}"


def _fields_at(parents: list[Any]) -> list[str]:
    model: Any = Recipe
    for part in parents:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        model = next(a for a in nested if isinstance(a, type) and issubclass(a, BaseModel))
    return list(model.model_fields)


__all__ = ["Recipe", "check_device"]
