"""The table of pruned models, those that wait for their evaluation too: sizes, figures and times beside the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.explain import EvaluationRecord
from prunekit.measure import Lost
from prunekit.report.measures import Shown, deciding, shown, three
from prunekit.report.sections.section import Overview, RunArtifacts
from prunekit.report.verdict import amount, of_evaluation

SAME = 0.005
"""Sizes whose ratio is off 1 by less are called the same: a file's header makes some bytes of difference."""

PACES = {"prefill": "prefill", "decode": "decoding"}
"""What of a language model's speed is shown, and how it is called."""


@dataclass(frozen=True)
class Cell:
    """A figure, what it comes to beside the dense model's, and what it is sorted by; empty where nothing is known."""

    text: str = ""
    beside: str = ""
    value: float | str = ""


@dataclass(frozen=True)
class Column:
    """A heading, and its cell of the dense and of a pruned model."""

    head: str
    dense: Callable[[EvaluationRecord], Cell]
    pruned: Callable[[EvaluationRecord], Cell]


def _values(runs: Sequence[RunArtifacts]) -> dict[str, Any] | None:
    if not any(run.models for run in runs):
        return None
    columns = _columns([e for run in runs for e in run.evaluations.values()])
    return {
        "several": len(runs) > 1,
        "heads": [column.head for column in columns],
        "rows": [row for run in runs for row in _rows(run, columns)],
        "machines": sorted({e.latency["machine"] for run in runs for e in run.evaluations.values()}),
    }


def _rows(run: RunArtifacts, columns: Sequence[Column]) -> Iterable[dict[str, Any]]:
    """The dense model, and every pruned one; of those that wait for their evaluation the command instead of cells."""
    if run.evaluations:
        dense = next(iter(run.evaluations.values()))
        yield {"run": run.name, "model": "dense", "made": "", "cells": [column.dense(dense) for column in columns]}
    for name in run.models:
        if (found := run.evaluations.get(name)) is not None:
            yield {"run": run.name, "model": name, "made": _made(found.made_from), "cells": [c.pruned(found) for c in columns]}
        else:
            made = {**run.pruned[name].provenance, "structure": run.pruned[name].structure}
            command = run.evaluating(name) if run.has_data else ""
            yield {"run": run.name, "model": name, "made": _made(made), "cells": None, "command": command}


def _made(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(facts[key]) for key in ("criterion", "allocation", "structure") if facts.get(key))


def _columns(every: Sequence[EvaluationRecord]) -> list[Column]:
    """Of the measures and batch sizes that any evaluation has."""
    measures = list(dict.fromkeys(measure for e in every for measure in shown(e.measures)))
    batches = list(dict.fromkeys(batch for e in every for batch in e.latency["batches"]))
    told = [e.language["generation"]["batches"] for e in every if e.language and "generation" in e.language]
    paces = list(dict.fromkeys((key, size) for each in told for size, pace in each.items() for key in PACES if key in pace))
    return [
        Column("parameters that stay", lambda e: _whole(e.dense["parameters"]), _stay),
        *(_measured(measure) for measure in measures if not measure.close),
        Column("lost", lambda _: Cell(), _lost),
        *(_latency(batch) for batch in batches),
        *(_pace(key, batch) for key, batch in paces),
        *(_size(key, head) for key, head in (("macs", "theoretical MACs"), ("bytes", "bytes on disk"))),
        *(_measured(measure) for measure in measures if measure.close),
    ]


def _stay(found: EvaluationRecord) -> Cell:
    verdict = of_evaluation(found)
    return _whole(verdict.kept, verdict.total)


def _whole(figure: float, dense: float | None = None) -> Cell:
    """A whole number, and how many times fewer it is than the dense model's."""
    return Cell(f"{int(figure):,}", "" if dense is None else _fewer(figure, dense), figure)


def _fewer(figure: float, dense: float) -> str:
    if not figure or not dense:
        return ""
    ratio = dense / figure
    if abs(ratio - 1) < SAME:
        return "as many"
    return f"{three(ratio)}× fewer" if ratio > 1 else f"{three(1 / ratio)}× more"


def _size(key: str, head: str) -> Column:
    return Column(head, lambda e: _whole(e.dense[key]), lambda e: _whole(e.pruned[key], e.dense[key]))


def _measured(measure: Shown) -> Column:
    def cell(figures: Mapping[str, float]) -> Cell:
        figure = figures.get(measure.name)
        return Cell() if figure is None else Cell(measure.spaced(figure), "", figure)

    head = measure.label if measure.close else f"test {measure.label}"
    return Column(head, lambda e: Cell() if measure.close else cell(e.dense), lambda e: cell(e.pruned))


def _lost(found: EvaluationRecord) -> Cell:
    lost: Lost | None = found.lost["test"] if found.lost else None
    if lost is None or "lost" not in lost:
        return Cell()
    measure = deciding(found.measures)
    points = measure.unit == "%"
    error = f" ± {amount(lost['standard_error'], points)}" if "standard_error" in lost else ""
    figure = amount(lost["lost"], points).replace("-", "−")
    return Cell(f"{figure}{error}", "points" if points else measure.unit or measure.plain, lost["lost"])


def _latency(batch: str) -> Column:
    def pruned(found: EvaluationRecord) -> Cell:
        times = found.latency["batches"].get(batch)
        if times is None:
            return Cell()
        ratio = times.get("speedup") or (times["dense_ms"] / times["pruned_ms"] if times["pruned_ms"] else 0.0)
        between = f" ({three(times['low'])}–{three(times['high'])})" if {"low", "high"} <= times.keys() else ""
        return Cell(f"{three(times['pruned_ms'])}", f"{three(ratio)}× as fast{between}", times["pruned_ms"])

    def dense(found: EvaluationRecord) -> Cell:
        times = found.latency["batches"].get(batch)
        return Cell() if times is None else Cell(three(times["dense_ms"]), "", times["dense_ms"])

    return Column(f"ms, batch {batch}", dense, pruned)


def _pace(key: str, batch: str) -> Column:
    """Tokens a second of reading a prompt, or of writing with the cache."""

    def cell(found: EvaluationRecord, name: str) -> Cell:
        generation = found.language.get("generation") if found.language else None
        pace: Any = generation["batches"].get(batch) if generation else None
        if pace is None or key not in pace:
            return Cell()
        rates = pace[key]
        median, faster = rates[name]["median"], rates["speedup"]
        between = f"{three(faster['median'])}× as fast ({three(faster['low'])}–{three(faster['high'])})"
        return Cell(three(median), between if name == "pruned" else "", median)

    return Column(f"tokens/s, {PACES[key]}, batch {batch}", lambda e: cell(e, "dense"), lambda e: cell(e, "pruned"))


OVERVIEW = Overview(
    title="Pruned models",
    values=_values,
    template='{% include "sections/models.html.j2" %}',
)
