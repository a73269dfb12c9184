"""What a section of a run's page is, and what it may draw from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

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
        pruned: names of the pruned models.
        evaluations: by pruned model's name, of those that were evaluated.
        removals: by pruned model's name, of those that were refined, evaluated and explained.
        single: the artifacts that sections ask for in ``Section.reads``; see ``one``.
    """

    path: Path
    recipe: str
    has_data: bool
    trajectory: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]] = ()
    training: TrainingRecord | None = None
    comparison: Comparison | None = None
    pruned: Sequence[str] = ()
    evaluations: Mapping[str, EvaluationRecord] = field(default_factory=dict)
    removals: Mapping[str, RemovalRecord] = field(default_factory=dict)
    single: Mapping[type[Artifact], Artifact] = field(default_factory=dict)

    def one(self, kind: type[Kind]) -> Kind | None:
        """The artifact of a kind that ``Section.reads`` asks for; None where the run has none."""
        found = self.single.get(kind)
        return found if isinstance(found, kind) else None

    def added_by_eval(self, what: str, name: str) -> str:
        """The line which says that the run lacks ``what``, and that evaluating the pruned model ``name`` adds it."""
        folder = self.path / "pruned" / name
        again = " --overwrite" if name not in self.evaluations and (folder / "eval.json").exists() else ""  # one that is damaged
        return f"no {what}; prunekit eval {folder}{again} adds it"


def _nothing(_: RunArtifacts) -> Sequence[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page: a heading, and below it a template that is filled with values.

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
