"""A pruned model in three figures with their words: how much smaller, what was lost, how much faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.explain import EvaluationRecord
from prunekit.measure import Lost, Speed, noisy
from prunekit.report.measures import Shown, three
from prunekit.report.verdict import Verdict, amount, of_evaluation

NOT_SMALLER = 0.95
"""A file of more than this share of the dense one's bytes is called as large."""


@dataclass(frozen=True)
class Figure:
    """A heading, a figure under it, and the words that belong to the figure."""

    heading: str
    figure: str
    words: str


@dataclass(frozen=True)
class Headline:
    """What is said first of a pruned model, and the verdict's line."""

    figures: tuple[Figure, Figure, Figure]
    line: str


def headline(found: EvaluationRecord) -> Headline:
    """The headline of an evaluated model: of test data, which no choice has seen."""
    verdict = of_evaluation(found)
    as_large = found.pruned["bytes"] > NOT_SMALLER * found.dense["bytes"]
    if "test" in verdict.lost:
        lost = _lost(verdict.lost["test"], verdict.measure, verdict.classes)
    else:
        lost = _figures(found, verdict.measure)
    return Headline((_size(verdict, as_large), lost, _speed(verdict.speed)), verdict.text())


def _size(verdict: Verdict, as_large: bool) -> Figure:
    figure = f"{three(verdict.total / verdict.kept)}×" if verdict.kept else "all gone"
    words = f"{verdict.kept:,} of {verdict.total:,} parameters stay"
    if as_large and verdict.kept < verdict.total:
        return Figure("fewer weights", figure, f"{words}; the others are zeros, in a file as large as before")
    return Figure("smaller", figure, words)


def _lost(found: Lost, measure: Shown, classes: Sequence[int]) -> Figure:
    what = f"test {measure.plain}" + (f" on classes {', '.join(map(str, classes))}" if classes else "")
    if "lost" not in found or "dense" not in found:
        return Figure(what, measure.number(found["pruned"]), "")
    points = measure.unit == "%"
    unit = "points " if points else f"{measure.unit} " if measure.unit else ""
    error = f" ± {amount(found['standard_error'], points)}" if "standard_error" in found else ""
    heading = f"{unit}{'gained' if found['lost'] < 0 else 'lost'}"
    words = f"{what}: {measure.number(found['dense'])} → {measure.number(found['pruned'])}"
    samples = f", {found['samples']:,} samples" if "samples" in found else ""
    return Figure(heading, amount(abs(found["lost"]), points) + error, words + samples)


def _figures(found: EvaluationRecord, measure: Shown) -> Figure:
    """Of an older file, which does not tell what was lost."""
    went = f"{measure.number(found.dense[measure.name])} → {measure.number(found.pruned[measure.name])}"
    return Figure(f"test {measure.brief}", went, f"{found.test_samples:,} samples; an older evaluation, which has no error")


def _speed(found: Speed | None) -> Figure:
    if found is None:
        return Figure("speed", "not known", "an older evaluation, which has no interval")
    heading = "faster" if found["low"] > 1 else "slower" if found["high"] < 1 else "as fast, within the error"
    between = f"95 % interval {three(found['low'])}–{three(found['high'])}×"
    times = f"{three(found['pruned_ms'])} ms instead of {three(found['dense_ms'])}"
    noise = "; a noisy machine" if noisy(found) else ""
    return Figure(heading, f"{three(found['speedup'])}×", f"{between}, batch {found['batch']}: {times}{noise}")
