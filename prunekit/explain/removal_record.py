"""removal.json: what a refined model's mask is to blame for, kept with images of the samples that it tells of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NotRequired, TypedDict

from prunekit.artifact import Artifact, Cost, conform
from prunekit.explain.passages import Passage
from prunekit.explain.pictures import Picture


class LayerBlame(TypedDict):
    layer: str
    blame: float


ClassBlame = TypedDict("ClassBlame", {"class": int, "blame": float})


class Blame(TypedDict):
    """Blame in all, by layer, and by class where there are classes."""

    blame: float
    layers: list[LayerBlame]
    classes: NotRequired[list[ClassBlame]]


class MaskBlame(Blame):
    """The same of a whole mask, with its divergence, what blame misses of it, and the ``part`` that came back."""

    divergence: float
    residual: float
    part: Blame


class AskingSample(TypedDict):
    """A sample that blames a unit: its number, its label, the models' answers where there are classes."""

    index: int
    label: Any
    blame: float
    dense: NotRequired[Any]
    masked: NotRequired[Any]


class Unit(TypedDict):
    name: str
    blame: float
    samples: list[AskingSample]


class Step(TypedDict):
    """A step of refining, taken or not."""

    stage: str
    round: int
    learn: float
    accept: float
    kept: bool


class History(TypedDict):
    history: list[Step]


class Moved(TypedDict):
    back: int
    out: int


class RemovalTold(TypedDict):
    """What a page shows of ``prunekit.explain.explain_removal``."""

    what: str
    name: str
    split: str
    samples: int
    nodes: int
    structure: str
    divergence_is: NotRequired[str]
    before: MaskBlame | None
    after: MaskBlame
    refine: History | None
    refined_again: int
    by_layers: NotRequired[bool]
    moved: Moved | None
    units: list[Unit]


@dataclass(frozen=True, kw_only=True)
class RemovalRecord(Artifact):
    """An explanation of a removal.

    Attributes:
        made_from: the trajectory, the plan, and what identifies the samples.
        told: see ``prunekit.explain.explain_removal``.
        pictures: samples of its units, by place; empty where the data are neither images nor text.
    """

    KIND: ClassVar[str] = "removal"
    CALLED: ClassVar[str] = "explanation of a removal"

    made_from: dict[str, Any]
    told: dict[str, Any]
    pictures: dict[str, list[Picture | Passage]]
    cost: Cost

    def check(self) -> None:
        """The explanation has what is shown of it, and the same layers before and after."""
        conform(self.told, RemovalTold, "told")
        before, after = self.told["before"], self.told["after"]
        if before is not None and [r["layer"] for r in before["layers"]] != [r["layer"] for r in after["layers"]]:
            raise ValueError("told.before and told.after must have the same layers")
