"""Sections of a recipe: model, data, training, scoring, comparing, evaluating."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from prunekit.criteria import AGGREGATIONS, DEFAULT
from prunekit.data.files.options import SPLIT_NAMES, Options, every_placed
from prunekit.huggingface import AUTO
from prunekit.kernel import SHARES
from prunekit.recipe.pruning import CompareRefine
from prunekit.recipe.training import Optimizer, RateSchedule
from prunekit.recipe.values import (
    AllocationName,
    Count,
    CriterionName,
    ImportPath,
    Nodes,
    Positive,
    RuleName,
    Section,
    Share,
    StructureName,
    known,
    one_of,
    parse_bytes,
    switched,
)
from prunekit.task import TARGET_NAMES
from prunekit.training import AUGMENTATIONS


class Model(Section):
    """``factory`` and ``args``, as of any factory; or ``pretrained``: a folder with config.json and safetensors, of which nothing

    runs, relative to the recipe. Its class is what the config's ``architectures`` says, or ``auto``: a class of transformers
    such as ``AutoModelForSequenceClassification``.
    """

    factory: str | None = None
    args: dict[str, Any] = {}
    pretrained: str | None = None
    auto: str | None = None

    @field_validator("pretrained")
    @classmethod
    def _pretrained(cls, value: str | None) -> str | None:
        if value is not None and (not value or "\0" in value):
            raise ValueError("name a folder")
        return None if value is None else os.path.abspath(value)

    @field_validator("auto")
    @classmethod
    def _auto(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(AUTO, value) is None:
            raise ValueError("it must be a class of transformers such as AutoModelForSequenceClassification")
        return value

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.factory is None) == (self.pretrained is None):
            raise ValueError("give factory (module:function), or pretrained (a folder with config.json)")
        if self.pretrained is not None and self.args:
            raise ValueError("args are a factory's; pretrained has none")
        if self.pretrained is None and self.auto is not None:
            raise ValueError("auto goes with pretrained")
        return self

    @model_serializer(mode="wrap")
    def _said(self, every: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = ("factory", "args") if self.pretrained is None else ("pretrained", "auto")
        return {key: value for key, value in every(self).items() if key in kept}

    @property
    def source(self) -> str:
        """Where the model comes from: the factory, or the folder."""
        return str(self.pretrained if self.factory is None else self.factory)

    @property
    def said(self) -> str:
        """The same with its key, for messages."""
        return f"model.{'pretrained' if self.factory is None else 'factory'}: {self.source}"


class Data(Section):
    """``factory``: import path ``module:function``; ``args``: its keyword arguments; ``path``: where the data lie, for factories

    that read files, given to them as ``path``. Or ``files``: a file, a folder, the name of a data set on the Hugging Face hub,
    or a mapping of splits to these, relative to the recipe; the other keys say how they are read, see docs/huggingface.md.
    """

    factory: str | None = None
    args: dict[str, Any] = {}
    path: str | None = None
    files: str | dict[str, str] | None = None
    text: list[str] = []
    label: list[str] = []
    image: str | None = None
    audio: str | None = None
    length: Count | None = None
    stride: Count | None = None
    join: str | None = None
    skip_bad: bool = False
    tokenizer: str | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = Options.validation
    test: Annotated[float, Field(gt=0, lt=1)] = Options.test
    scoring: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    classes: list[str] | None = None
    subset: str | None = None

    @field_validator("text", "label", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("files")
    @classmethod
    def _files(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for name, place in value.items() if isinstance(value, dict) else (("", value),):
            if place is not None and (not place or "\0" in place):
                raise ValueError("name a file or a folder")
            if name and name not in SPLIT_NAMES:
                raise ValueError(f"{name!r} is no split; they are train, validation, test and scoring")
        if isinstance(value, dict):
            kept = [SPLIT_NAMES[name] for name in value]
            if "train" not in kept or len(set(kept)) < len(kept):
                raise ValueError("name each split once, and train among them")
        return None if value is None else every_placed(value, Path())

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer(cls, value: str | None) -> str | None:
        if value is not None and (not value or "\0" in value):
            raise ValueError("name a folder")
        return None if value is None else os.path.abspath(value)

    @model_validator(mode="after")
    def _one(self) -> Data:
        if (self.factory is None) == (self.files is None):
            raise ValueError("give factory (module:function), or files (a file, a folder, or a mapping of splits)")
        strange = (self.model_fields_set & READ) if self.files is None else (self.model_fields_set & {"args", "path"})
        if strange and any(getattr(self, key) != type(self).model_fields[key].default for key in strange):
            raise ValueError(f"{sorted(strange)[0]} goes with {'files' if self.files is None else 'factory'}")
        if self.stride is not None and self.length is not None and self.stride > self.length:
            raise ValueError(f"stride {self.stride} is above length {self.length}, so that tokens would be left out")
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation:g} and test {self.test:g} leave nothing for training")
        return self

    @model_serializer(mode="wrap")
    def _said(self, every: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = ("factory", "args", "path") if self.files is None else ("files", *READ)
        return {key: value for key, value in every(self).items() if key in kept}

    def arguments(self) -> dict[str, Any]:
        """What the factory is called with."""
        return self.args if self.path is None else {**self.args, "path": self.path}

    def options(self) -> Options:
        """How the files are read."""
        told: dict[str, Any] = {key: getattr(self, key) for key in READ}
        told |= {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
        return Options(**told)

    @property
    def source(self) -> str:
        """Where the data come from: the factory, or the files."""
        if isinstance(self.files, dict):
            return ", ".join(self.files.values())
        return str(self.factory if self.files is None else self.files)


READ = frozenset(Options.__dataclass_fields__)
"""Keys of ``data`` that say how files are read."""


class Record(Section):
    """What the recorder keeps: see ``prunekit.Recorder``."""

    every: Count = 1
    states: Literal["whole", "half"] = "whole"
    second_moments: bool = False
    snapshot_every: Annotated[int, Field(ge=0)] = 100


class Watch(Section):
    """The task's first measure on training and validation data after every ``every`` epochs, kept in train.json; of a split with

    more than 4,096 samples on so many, spread over it.

    ``until``: training ends early once both are at least this good (a share, of accuracy).
    """

    every: Count = 10
    until: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Train(Section):
    """``drop_last``: leave out an epoch's last batch where it is smaller; ``augment``: a name from

    ``prunekit.training.AUGMENTATIONS``, or a function ``(inputs, generator) -> inputs`` by import path.
    """

    record: Record = Record()
    optimizer: Optimizer = Optimizer()
    schedule: RateSchedule = RateSchedule()
    epochs: Count = 20
    batch_size: Count = 64
    drop_last: bool = False
    augment: str | None = None
    watch: Watch | None = None

    @field_validator("augment")
    @classmethod
    def _augment(cls, value: str | None) -> str | None:
        return value if value is None or ":" in value else known(value, AUGMENTATIONS, "augmentation")


class Prunable(Section):
    """``ignore``: shell-style patterns of parameter names that may not be pruned; ``include``: of parameters that may be, though

    they are no layer's weights, such as ``positions``.
    """

    ignore: list[str] = []
    include: list[str] = []


class Score(Section):
    """``criteria``: names with options and compositions, see ``prunekit.criteria.spec``; ``samples``: the most scoring

    samples. The rest says how influence looks at the path (docs/kernel.md):

    ``quadrature: ranking`` takes a fixed ``rule`` with ``nodes``, in the first steps other nodes by ``early: [steps, nodes]``;
    ``reconstruction`` halves steps until every interval's sum is within ``tolerance``. ``memory`` holds the scores in work.

    ``optimizer_rules``: of optimizers that prunekit does not know, ``{my_module.MyOptimizer: my_module:MyRule}``.

    ``skip_unfit``: wanda, obs, kfac and flap score by magnitude what has no inputs that they can look at, instead of refusing.
    """

    criteria: Annotated[list[CriterionName], Field(min_length=1)] = list(DEFAULT)
    target: str | None = None
    samples: Count = 160
    share: Annotated[str, one_of(SHARES, "share")] = "kernel"
    aggregation: Annotated[str, one_of(AGGREGATIONS, "aggregation")] = "l1"
    quadrature: Literal["ranking", "reconstruction"] = "ranking"
    rule: RuleName = "midpoint"
    nodes: Nodes = 1
    early: tuple[Count, Nodes] | None = None
    tolerance: Positive = 0.01
    stride: Count = 1
    phase: tuple[int, int] | None = None
    memory: str = "512MiB"
    skip_unfit: bool = False
    optimizer_rules: dict[str, ImportPath] = {}

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
        return value if value is None or ":" in value else known(value, TARGET_NAMES, "target")


class Attention(Section):
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


class Family(Section):
    """Names of a family's layers as they are reached from one module; see ``prunekit.structure.families``.

    ``q``, ``k``, ``v`` (or ``qkv``) and ``o``: attention; ``heads``, ``kv_heads``: attributes with its numbers of heads.
    ``up``, ``down``: layers whose outputs are neurons, and the one that reads them. ``router``, ``experts``: of a mixture.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    o: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    up: str | Annotated[list[str], Field(min_length=1)] | None = None
    down: str | None = None
    router: str | None = None
    experts: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Family:
        separate = [name is not None for name in (self.q, self.k, self.v)]
        attention = any(separate) or self.qkv is not None
        if any(separate) != all(separate) or (any(separate) and self.qkv is not None) or attention != (self.o is not None):
            raise ValueError("give q, k, v and o, or qkv and o")
        if (self.up is None) != (self.down is None):
            raise ValueError("give up and down together")
        if (self.router is None) != (self.experts is None):
            raise ValueError("give router and experts together")
        if not (attention or self.up or self.router):
            raise ValueError("names no layers: give q, k, v and o; up and down; or router and experts")
        return self


AttentionOrFamily = Annotated[
    Annotated[Attention, Tag("dict")] | Annotated[ImportPath, Tag("str")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "dict"),
]
"""One attention, or ``module:function`` that gives such mappings of a model."""


class Structure(Section):
    """``attention``: attention whose heads the names of its layers do not give away; ``module:function`` makes such mappings.

    ``families``: names of the layers of blocks, by a name of your own; they come before ``prunekit.structure.families``'.
    ``round_to``, ``min_units``: of channels and heads, a multiple of the first stays, and at least the second; see ``make_plan``.
    """

    attention: list[AttentionOrFamily] = []
    families: dict[str, Family] = {}
    round_to: Count = 1
    min_units: Count = 1

    def mappings(self) -> list[dict[str, Any] | str]:
        own: list[dict[str, Any] | str] = [{"family": row.model_dump()} for row in self.families.values()]
        return [*own, *(spec if isinstance(spec, str) else spec.model_dump() for spec in self.attention)]


class Compare(Section):
    """``refine``: also repair the best plan of every structure and sparsity (``true`` takes the defaults)."""

    structures: Annotated[list[StructureName], Field(min_length=1)] = ["unstructured", "channels"]
    allocations: Annotated[list[AllocationName], Field(min_length=1)] = ["global", "uniform", "mean", "lamp"]
    sparsities: Annotated[list[Share], Field(min_length=1)] = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
    refine: Annotated[CompareRefine | None, BeforeValidator(switched)] = None

    @model_validator(mode="after")
    def _compared(self) -> Compare:
        for sparsity in (self.refine.sparsities if self.refine else None) or ():
            if sparsity not in self.sparsities:
                raise ValueError(f"refine.sparsities has {sparsity:g}, which is none of the sparsities compared")
        return self


class Generation(Section):
    """``prompt`` tokens are read, then ``tokens`` written one by one with the cache, in each of ``batches``."""

    prompt: Count = 128
    tokens: Count = 32
    batches: Annotated[list[Count], Field(min_length=1)] = [1, 16]


class Eval(Section):
    """``samples``: test samples whose outputs the kernel rebuilds, null: 128, of language models 8 texts; 0: no account.

    ``tolerance``: allowed error of every interval per sample, reached by halving; ``nodes``: a fixed number of nodes a step by
    ``rule`` instead (the pruning step keeps its tolerance); ``stride``: kept states a piece; ``generation``: how the speed of a
    causal language model is measured, ``false`` for not at all.
    """

    samples: Annotated[int, Field(ge=0, le=10**6)] | None = None
    tolerance: Positive = 0.005
    nodes: Nodes | None = None
    rule: RuleName = "midpoint"
    stride: Count = 1
    latency_batches: list[Count] = [1, 64]
    generation: Annotated[Generation | None, BeforeValidator(switched)] = Generation()

    @model_serializer(mode="wrap")
    def _said(self, every: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = every(self)
        if self.generation == Generation():  # a recipe of another model says nothing of it
            found.pop("generation", None)
        return found
