"""What a section of a run's page is, what stands above the sections, and what both may draw from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prunekit.apply import Manifest
from prunekit.artifact import Artifact
from prunekit.explain import EvaluationRecord, RemovalRecord
from prunekit.search.compare import Comparison
from prunekit.training.record import TrainingRecord

Kind = TypeVar("Kind", bound=Artifact)


@dataclass(frozen=True, kw_only=True)
class RunArtifacts:
    """What a run holds by now that is whole and was made from its trajectory.

    Attributes:
        path: the run folder, as the user wrote it; commands name it.
        recipe: the resolved recipe as text.
        has_data: whether the recipe names data, without which no command measures anything.
        trajectory: ``steps``, ``coordinates``, ``bytes``, ``hash``.
        scores: one mapping a score file: ``criterion``, ``digest``, ``seconds``.
        training: None for an imported model.
        comparison: None before ``compare``.
        pruned: manifests by pruned model's name, evaluated or not.
        evaluations: by pruned model's name, of those that were evaluated.
        removals: by pruned model's name, of those that were refined, evaluated and explained.
        single: the artifacts that sections ask for in ``Section.reads``; see ``one``.
        left_out: what the run folder holds but the page does not show, and why, one line each.
        called: what tells it from other runs on the page; the folder's name where this is empty.
    """

    path: Path
    recipe: str
    has_data: bool
    trajectory: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]] = ()
    training: TrainingRecord | None = None
    comparison: Comparison | None = None
    pruned: Mapping[str, Manifest] = field(default_factory=dict)
    evaluations: Mapping[str, EvaluationRecord] = field(default_factory=dict)
    removals: Mapping[str, RemovalRecord] = field(default_factory=dict)
    single: Mapping[type[Artifact], Artifact] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    called: str = ""

    @property
    def name(self) -> str:
        """How the page calls the run."""
        return self.called or self.path.resolve().name

    @property
    def models(self) -> list[str]:
        """Names of pruned models: those that were evaluated, and those that wait for it."""
        return sorted({*self.pruned, *self.evaluations})

    def one(self, kind: type[Kind]) -> Kind | None:
        """The artifact of a kind that ``Section.reads`` asks for; None where the run has none."""
        found = self.single.get(kind)
        return found if isinstance(found, kind) else None

    def added_by_eval(self, what: str, name: str) -> str:
        """The line which says that the run lacks ``what``, and that evaluating the pruned model ``name`` adds it."""
        return f"no {what}; {self.evaluating(name)} adds it"

    def evaluating(self, name: str) -> str:
        """The command that evaluates the pruned model ``name``."""
        folder = self.path / "pruned" / name
        again = " --overwrite" if name not in self.evaluations and (folder / "eval.json").exists() else ""  # one that is damaged
        return f"prunekit eval {folder}{again}"


def _nothing(_: RunArtifacts) -> Sequence[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a run: a heading, and folded below it a template that is filled with values.

    Attributes:
        title: the heading, a Jinja template as text.
        values: what the templates show, by name; None leaves the section out, for the run lacks what it is about.
        template: what stands below the heading, likewise. All values are escaped. A long template is a file beside the
            section's, ``{% include "sections/NAME.html.j2" %}``.
        reads: artifacts of the run that this section shows, and where they lie in the run folder. Each says in ``made_from``
            which ``trajectory`` it was made from.
        missing: one line for each thing that the section would show if the run had it, with the command that adds it; asked
            for runs with data.
    """

    title: str
    values: Callable[[RunArtifacts], Mapping[str, Any] | None]
    template: str
    reads: Mapping[type[Artifact], str] = field(default_factory=dict)
    missing: Callable[[RunArtifacts], Sequence[str]] = _nothing


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What stands open above the sections, about all runs of the page at once.

    Attributes:
        title, template: as a section's.
        values: what the templates show; None leaves it out, for no run has what it is about.
    """

    title: str
    values: Callable[[Sequence[RunArtifacts]], Mapping[str, Any] | None]
    template: str
