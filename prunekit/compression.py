"""One call from a trained model and data to a smaller model: score, choose on validation samples, repair, prune, measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.apply import masked, prune, save
from prunekit.apply.answers import check_answers
from prunekit.apply.manifest import manifest_of
from prunekit.batch import Inputs
from prunekit.criteria import score
from prunekit.data import Samples
from prunekit.errors import UsageError, check_seed
from prunekit.exporting import Subject, written
from prunekit.exporting.pretrained import is_pretrained
from prunekit.measure import Lost, merit, sizes
from prunekit.plan import ACROSS, GROUPED, Plan, asked_sparsity, make_plan
from prunekit.repair import refine
from prunekit.search import Candidates, choose
from prunekit.structure import check_structure, implied_sparsity
from prunekit.task import Task
from prunekit.task.evaluation import References, compared, evaluate, measures_told
from prunekit.task.settle import settle
from prunekit.trajectory import Trajectory
from prunekit.trajectory.bare import bare

PARTS = {"scoring": 0.5, "validation": 0.25, "test": 0.25}
"""Shares of the samples: scores and repairs are computed on the first part, choices made on the second, figures on the third."""


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made.

    Attributes:
        model: the pruned model.
        plan: what was removed, and why (``provenance``).
        report: ``dense`` and ``pruned`` figures on test samples by measure, ``measures`` (their directions and units), ``chosen``
            criterion and allocation, ``refined`` (whether the repaired plan was better on validation samples), ``lost`` (of the
            first measure, on validation and on test samples, with its standard error), ``sizes`` of both (``parameters``,
            ``nonzero``, ``macs``).
        example: a few inputs, on which ``save`` compares what it wrote.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    example: Inputs | None = field(default=None, repr=False)

    @property
    def verdict(self) -> str:
        """One line on it: what stays, what was lost on validation samples, what on test samples; ``print`` shows it."""
        from prunekit.report.measures import deciding
        from prunekit.report.verdict import Verdict

        total = self.report["sizes"]["dense"]["parameters"]
        kept = round(total * (1 - self.plan.sparsity()["all"]))
        return Verdict(kept=kept, total=total, measure=deciding(self.report["measures"]), lost=self.report["lost"]).text()

    def __str__(self) -> str:
        return self.verdict

    def save(self, folder: str | Path) -> None:
        """Writes the pruned model: one of transformers as ``prunekit export --to hf`` does, any other as ``prunekit.save``.

        ``from_pretrained`` loads the first where a config can say its shapes, and ``prunekit.load_hf`` always; ``prunekit.load``
        loads the other. An earlier one in the folder is replaced.

        Raises:
            UsageError: transformers does not save it; says why.
            ArtifactError: the folder holds something else, or what was written computes something else.
        """
        facts = {"report": self.report}
        if not is_pretrained(self.model):
            save(self.model, self.plan, folder, facts)
            return
        manifest = manifest_of(self.model, self.plan, facts)
        written(Subject(self.model, self.example, manifest), "hf", Path(folder), overwrite=True)


def compress(
    model: nn.Module,
    data: Any,
    *,
    sparsity: float | None = None,
    structure: str = "unstructured",
    criteria: str | Sequence[str] | None = None,
    task: str | Task | None = None,
    loss: Any = None,
    ignore: Iterable[str] = (),
    refine_seconds: float | None = 60.0,
    seed: int = 0,
) -> Compressed:
    """Makes a trained model smaller, with every choice made on samples of its own.

    The samples are split at random into three parts (``PARTS``). Criteria score on the first; the criterion and allocation whose
    plan does best on the second are taken; the plan is refined, which is kept if it does better there; both models are measured
    on the third. It is ``prunekit score``, ``prune --criterion auto`` and ``eval`` for a model in memory. Influence needs the
    recorded training path and so the single steps (``Recorder``, ``score``, ``make_plan``).

    Args:
        model: the trained model; left as it is.
        data: batches ``(inputs, labels)`` or mappings with labels among them, a data set, or a ``DataLoader``.
        sparsity: share of the prunable parameters to remove, in [0, 1); half of them when None, and of N:M what it says.
        structure: as in ``prunekit.make_plan``.
        criteria: as in ``prunekit.score``; ``magnitude`` and ``taylor`` when None.
        task, loss, ignore: as in ``prunekit.score``.
        refine_seconds: for the repair; None for as long as it takes, 0 for none.
        seed: of the split and of the repair.

    Raises:
        UsageError: fewer than eight samples, or what ``score`` and ``make_plan`` refuse.
        NonFiniteError: the pruned model would answer NaN.

    Example:
        >>> import prunekit, torch
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> small = prunekit.compress(model, [(x, x[:, 0].gt(0).long())], sparsity=0.5, structure="channels")
        >>> small.report["sizes"]["pruned"]["parameters"] < small.report["sizes"]["dense"]["parameters"]
        True
        >>> "parameters stay; validation accuracy" in str(small)
        True
        >>> small.model(x).shape
        torch.Size([64, 2])
    """
    check_seed(seed)
    model = bare(model)
    check_structure(structure)
    if sparsity is None and implied_sparsity(structure) is None:
        sparsity = 0.5
    sparsity = asked_sparsity(structure, sparsity)
    kind, samples = settle(model, data, task, loss)
    if samples is None or len(samples) < 8:
        raise UsageError(f"compress splits the samples into three parts and needs eight at least; it got {len(samples or ())}")
    parts = _parted(samples, seed)
    path, names = Trajectory.of(model), _criteria(kind, criteria)
    scores = {name: score(path, model, parts["scoring"], criterion=name, task=kind, ignore=ignore, seed=seed) for name in names}
    candidates = Candidates(model, scores, parts["validation"], [structure], task=kind)
    chosen = choose(candidates, None, structure, sparsity, ACROSS)
    example = parts["validation"].rows(0, 2)[0]
    plan = make_plan(
        scores[chosen["criterion"]],
        model,
        example if structure in GROUPED else None,
        sparsity=sparsity,
        structure=structure,
        allocation=chosen["allocation"],
    )
    refined = _refined(plan, model, parts["scoring"], kind, candidates, refine_seconds, seed)
    plan, better = (plan, False) if refined is None else (refined, True)
    small = prune(model, plan, example)
    check_answers(model, small, example)
    references = References(model, parts["test"], kind)
    found = {name: evaluate(each, parts["test"], kind, references) for name, each in (("dense", model), ("pruned", small))}
    report = {
        **{name: evaluation.figures() for name, evaluation in found.items()},
        "measures": measures_told(kind),
        "chosen": {key: chosen[key] for key in ("criterion", "allocation")},
        "refined": better,
        "lost": {
            "validation": _lost(model, small, parts["validation"], kind),
            "test": compared(found["pruned"], found["dense"]),
        },
        "sizes": {"dense": sizes(model, example), "pruned": sizes(small, example)},
        "samples": {name: len(part) for name, part in parts.items()},
    }
    return Compressed(small, plan, report, example)


def _lost(model: nn.Module, small: nn.Module, samples: Samples, task: Task) -> Lost:
    references = None if task.measures else References(model, samples, task)
    dense, pruned = (evaluate(each, samples, task, references) for each in (model, small))
    return compared(pruned, dense)


def _parted(samples: Samples, seed: int) -> dict[str, Samples]:
    """The three parts, disjoint, drawn at random."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [0, *(round(len(order) * share) for share in (0.5, 0.75, 1.0))]
    return {name: samples.take(sorted(order[a:b])) for name, a, b in zip(PARTS, ends, ends[1:], strict=False)}


def _criteria(task: Task, asked: str | Sequence[str] | None) -> Sequence[str]:
    """What to score by."""
    if asked is None:
        return cheap_criteria(task)
    if isinstance(asked, str):
        return [asked]
    if not asked:
        raise UsageError("compress needs one criterion at least; None takes magnitude and taylor")
    return asked


def cheap_criteria(task: Task) -> list[str]:
    """Criteria of one gradient at most, which need no path; a task without a loss has Taylor's look at its own target."""
    known: Mapping[str, Any] = task.targets()
    return ["magnitude", "taylor" if "loss" in known else f"taylor(target={task.target})"]


def _refined(
    plan: Plan, model: nn.Module, samples: Samples, task: Task, candidates: Candidates, seconds: float | None, seed: int
) -> Plan | None:
    """The repaired plan, where its model is better on validation samples."""
    if seconds == 0 or all(bool(keep.all()) for keep in plan.keep.values()):
        return None
    try:
        found = refine(plan, model, samples, task=task, budget_seconds=seconds, seed=seed)
    except UsageError:  # it is tried unasked: where it does not apply, the plan stays as it is
        return None
    before, after = (candidates.measured(masked(model, each)) for each in (plan, found))
    return found if merit(task.choosing, after) > merit(task.choosing, before) else None
