"""eval --lm-eval: a run's dense and pruned language models in the lm-evaluation-harness, beside each other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.errors import UsageError, nearest, theirs
from prunekit.explain import EvaluationRecord
from prunekit.explain.evaluation import Harness, HarnessTask
from prunekit.exporting.pretrained import is_pretrained
from prunekit.huggingface import quietly
from prunekit.imports import needed
from prunekit.verbs.pruned_folder import open_pruned
from prunekit.verbs.run_folder import Run

BATCH = 8
"""Requests that a model answers at once."""


class LmEval:
    """Tasks of the harness, looked up before anything long begins.

    Args:
        run: of a language model from a Hugging Face folder, whose tokenizer is there.
        tasks: names of tasks or groups, as the harness has them.
        include: a folder with further tasks (YAML), whose ``!function`` lines are code that runs.
        limit: documents a task; None for all.

    Raises:
        UsageError: lm-eval is not installed, knows no such task, or the model or its tokenizer is not for it.
    """

    def __init__(self, run: Run, tasks: Sequence[str], include: Path | None = None, limit: int | None = None) -> None:
        self.run, self.tasks, self.limit = run, list(tasks), limit
        needed("lm_eval")
        if not is_pretrained(run.model) or not run.model.can_generate():  # type: ignore[operator]
            raise UsageError(
                f"--lm-eval is for language models of transformers that generate; {type(run.model).__name__} is none"
            )
        self.tokenizer = _tokenizer(Path(run.recipe.model.source))
        if include is not None and not include.is_dir():
            raise UsageError(f"--lm-eval-include is {include}, which is no folder; name one with the tasks' YAML files")
        if include is not None and run.path.resolve() in (include.resolve(), *include.resolve().parents):
            raise UsageError(f"--lm-eval-include is {include}, which lies in the run folder, whose code is never run")
        with theirs("reading the tasks of lm-eval"), _silent():
            self.manager = _manager(self.tasks, include)
            known = list(self.manager.all_tasks)
        for name in self.tasks:
            if name not in known:
                hint = nearest(name, known)
                raise UsageError(
                    f"--lm-eval: the harness has no task {name!r:.80}"
                    + (f"; {hint}" if hint.startswith("did") else "; its folder goes by --lm-eval-include")
                )

    def added_to(self, record: EvaluationRecord, folder: Path) -> EvaluationRecord:
        """Measures both models and writes the figures into ``eval.json`` of the pruned one's folder.

        Raises:
            UsageError: the harness fails, as where a task's data cannot be fetched; the file stays as it was.
        """
        from lm_eval import __version__ as version

        _, _, pruned = open_pruned(self.run, folder)
        found = {"dense": self._measured(self.run.model), "pruned": self._measured(pruned)}
        tasks: dict[str, HarnessTask] = {}
        for name, figures in found["pruned"]["results"].items():
            told: HarnessTask = {
                "version": str(found["pruned"]["versions"].get(name, "")),
                "dense": _figures(found["dense"]["results"][name]),
                "pruned": _figures(figures),
            }
            if (count := found["pruned"]["n-samples"].get(name)) is not None:
                told["samples"] = int(count["effective"])
            tasks[name] = told
        harness: Harness = {"harness": f"lm-eval {version}", "tasks": tasks}
        whole = replace(record, lm_eval=harness)
        whole.save(folder / "eval.json")
        return whole

    def _measured(self, model: nn.Module) -> Mapping[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        where = next(model.parameters()).device
        with theirs(f"lm-eval, {', '.join(self.tasks)}"), _silent(), torch.random.fork_rng(devices=[]):
            model.to(self.run.device).eval()
            wrapped = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=BATCH)
            found: Mapping[str, Any] = simple_evaluate(
                wrapped, tasks=self.tasks, task_manager=self.manager, limit=self.limit, log_samples=False
            )
        model.to(where)
        return found


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """The harness's index: of the folder alone where it has every task, because reading its own thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if include is None else str(include))


def _figures(told: Mapping[str, Any]) -> dict[str, float]:
    """The harness's figures by name: ``acc``, ``acc_stderr``; of a filter other than ``none``, ``acc,strict``."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in told.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key
    }


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in the model's folder.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json")):
        raise UsageError(f"{folder}: has no tokenizer, which --lm-eval needs; save the model's own there (save_pretrained)")
    with theirs(f"{folder}: reading its tokenizer"), quietly():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _silent() -> Iterator[None]:
    """The harness logs what it was given."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
