"""compress: a model in a Hugging Face folder becomes a smaller one in another, by the other verbs in a row."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import ranks
from prunekit.compression import cheap_criteria
from prunekit.criteria import get_criterion, parse
from prunekit.criteria.layer_inputs import layers_with_inputs, refuse_unfit
from prunekit.data import Split
from prunekit.errors import ArtifactError, StructureError, UsageError
from prunekit.explain import EvaluationRecord
from prunekit.exporting.placing import RUN, run_in
from prunekit.exporting.record import export_in
from prunekit.imports import needed
from prunekit.plan import GROUPED
from prunekit.progress import Stages
from prunekit.recipe import Prune, Recipe, read_yaml
from prunekit.report.verdict import of_evaluation
from prunekit.reusing import first_difference
from prunekit.steps.low_rank import Adapted
from prunekit.structure import find_groups, prunable_parameters
from prunekit.task import Task
from prunekit.trajectory import Layout
from prunekit.verbs.budgets import check_budget
from prunekit.verbs.checks import with_task
from prunekit.verbs.dividing import check_tokens
from prunekit.verbs.exporting import export_pruned
from prunekit.verbs.pretrained import import_folders
from prunekit.verbs.reporting import score_to_report
from prunekit.verbs.run_folder import OF_THE_MACHINE, Run
from prunekit.verbs.tuning import check_epochs

STAGES = ("import", "score", "compare", "prune", "eval", "report", "export")
CRITERIA_OF_A_PATH = ("influence",)
"""What is scored by beside the cheap criteria where the folders are a path."""
LOOKED_AT = (0.25, 0.5, 0.75)
"""Sparsities that are compared where a budget says how much goes."""


def compress_content(content: dict[str, Any], wanted: Prune, criteria: Sequence[str]) -> dict[str, Any]:
    """The recipe's content: an import's, what is asked for, and a comparison of that alone.

    Args:
        content: of a recipe for ``import``.
        criteria: that the user names; what is cheap, and of a path influence, where there are none.
    """
    asked = wanted.sparsity if wanted.sparsity is not None else LOOKED_AT
    return {
        **content,
        **({"score": {"criteria": list(criteria)}} if criteria else {}),
        "compare": {
            "structures": [wanted.structure],
            "sparsities": [asked] if isinstance(asked, float) else list(asked),
            **({"allocations": [wanted.allocation]} if wanted.allocation is not None else {}),
        },
        "prune": [wanted.model_dump(mode="json", exclude_unset=True)],
    }


def check_out(
    recipe: Recipe, given: Sequence[Path], folders: Sequence[Path], out: Path, criteria: Sequence[str], overwrite: bool
) -> None:
    """Refuses what cannot be right before anything long begins.

    Args:
        given: what the user named.
        folders: the models' folders.
        criteria: that the user names.

    Raises:
        UsageError: ``out`` is a model's folder, lies in one or holds one; a package is not installed; there is no such class;
            a criterion needs a path, and one folder is none.
        ArtifactError: a folder is missing or not whole; or ``out`` holds what would be lost, or what was made from something
            else and may not be overwritten.
    """
    for package in ("transformers", "matplotlib", "jinja2"):
        needed(package)
    check_apart(given, folders, out)
    for single in (single for name in criteria if len(folders) == 1 for single in parse(name).singles):
        if get_criterion(single.text).needs_path:
            raise UsageError(
                f"--criterion {single.text} needs a path, and {given[0]} is one model; name several folders, in the order of "
                "their training, or take magnitude, taylor"
            )
    with_task(recipe)
    export = export_in(out)
    run = run_in(out)
    if run is None and os.path.lexists(out / RUN):
        raise ArtifactError(f"{out / RUN}: is no run folder; choose another --out")
    if overwrite:
        return
    if export is not None and run is None:
        raise ArtifactError(f"{out}: holds an export and no run of compress; use --overwrite to replace it, or another --out")
    if run is not None and (run / "recipe.yaml").is_file():
        before = _deciding(Recipe.resolved(read_yaml(run / "recipe.yaml"), run / "recipe.yaml"))
        now = _deciding(recipe)
        if recipe.task is None or _name(now["task"]) == _name(before["task"]):
            now["task"] = before["task"]  # import writes down what the data show of it
        now["data"] = {key: before["data"].get(key) if value is None else value for key, value in (now["data"] or {}).items()}
        if (difference := first_difference(before, now)) is not None:
            raise ArtifactError(f"{out}: was made by another compress ({difference}); use --overwrite, or another --out")


def check_apart(given: Sequence[Path], folders: Sequence[Path], out: Path) -> None:
    """Raises UsageError where ``out`` is a model's folder, lies in one or holds one."""
    own = Path(os.path.realpath(out))
    for folder in (*given, *folders):
        theirs = Path(os.path.realpath(folder))
        if own == theirs or theirs in own.parents:
            raise UsageError(
                f"--out is {out}, which {'is' if own == theirs else 'lies in'} the model's folder {folder}; name another"
            )
        if own in theirs.parents:
            raise UsageError(f"--out is {out}, which holds the model's folder {folder}; name another")


def _name(task: str | dict[str, Any] | None) -> Any:
    return task.get("name", task.get("factory")) if isinstance(task, dict) else task


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the model that is made of it, without where things lie: their content is compared later."""
    facts = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in (*OF_THE_MACHINE, "eval")}
    facts["model"] = {key: value for key, value in facts["model"].items() if key != "pretrained"}
    if recipe.data is not None:
        facts["data"] = {key: value for key, value in facts["data"].items() if key not in ("path", "files")}
    return facts


def compress_folders(
    recipe: Recipe,
    folders: Sequence[Path],
    out: Path,
    criteria: Sequence[str],
    overwrite: bool,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Import, score, compare, prune, eval, report under ``out/prunekit``, and the smaller model in ``out``.

    What is there already and unchanged is reused, so that a command that was cut off goes on where it was.

    Args:
        recipe: with one model to prune; see ``compress_content``.
        folders: of the model, or of checkpoints of it in the order of their training.
        criteria: that the user names; see ``criteria_of``.

    Returns:
        what these verbs say to programs, by their names; ``verdict``, one line; ``model``, ``samples`` by split.

    Raises:
        StructureError: the model does not take the structure.
        PrunekitError: what one of the verbs refuses.
    """
    place = out / RUN
    with Stages("compress", len(STAGES)) as stages:
        stages.begin("import")
        imported = import_folders(recipe, folders, place, overwrite, announce, check_model)
        run = Run(place)
        scored_by = criteria_of(run.task, len(run.trajectory) > 0, criteria)
        done = score_to_report(run, scored_by, overwrite, lambda verb, found: None, stages.begin)
        stages.begin("export")
        (wanted,) = run.recipe.prune
        exported = ranks.from_first(lambda: export_pruned(run, place / "pruned" / wanted.name, "hf", out, overwrite))
    return {
        "model": type(run.model).__name__,
        "samples": {name: len(split) for name, split in run.splits.items()},
        "import": imported,
        **done,
        "export": exported,
        "verdict": of_evaluation(EvaluationRecord.load(place / "pruned" / wanted.name / "eval.json")).text(),
    }


def check_model(recipe: Recipe, model: nn.Module, splits: Mapping[str, Split]) -> None:
    """Refuses what the model cannot become.

    Raises:
        StructureError: it does not take the structure that is asked for.
        PrunekitError: no plan of it is within the budget, there are too few tokens to learn from, no layer that a rank of
            ``lora`` fits, or weights that a criterion cannot score.
    """
    (wanted,) = recipe.prune
    example = splits["validation"].batch(range(min(2, len(splits["validation"]))))[0]
    pruned_away = prunable_parameters(model, Layout.of(model), recipe.prunable.ignore, recipe.prunable.include)
    for single in (single for name in recipe.score.criteria or () for single in parse(name).singles):
        if get_criterion(single.text).by_inputs and wanted.layerwise is None:
            refuse_unfit(layers_with_inputs(model, pruned_away)[1], single.text)
    if wanted.structure in GROUPED:
        try:
            find_groups(wanted.structure, model, example, recipe.structure.mappings())
        except StructureError as error:
            raise StructureError(f"--structure {wanted.structure}: {error}") from error
    check_budget(wanted, recipe, model, example)
    check_tokens(wanted, splits["train"].samples(), recipe.train.batch_size)
    check_epochs(wanted)
    if (tuned := wanted.finetune) is not None and tuned.lora is not None:
        Adapted.of(model, tuned.lora, pruned_away)


def criteria_of(task: Task, path: bool, named: Sequence[str] = ()) -> list[str]:
    """What is scored by: what the user named, else what is cheap, and of a path influence."""
    return list(named) or [*cheap_criteria(task), *(CRITERIA_OF_A_PATH if path else ())]
