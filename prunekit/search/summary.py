"""What a comparison over seeds shows: areas under curves, the regret of choosing, who is ahead of whom. Pure arithmetic on rows.

A *row* is one pruned model, measured: ``case``, ``seed``, ``structure``, ``criterion``, ``allocation``, ``sparsity``, ``control``
("" or "shuffled"), ``epochs`` (of fine-tuning, 0 for one-shot), ``repair`` ("", "compensated", "refined", another way, or a way
"+compensated"; repaired and fine-tuned rows name their ``method``), and ``validation`` and ``test``, each with the figures of the
task's measures. Beside the rows stands what the measures are (``prunekit.task.evaluation.measures_told``); the first decides.

A *variant* is a criterion with an allocation. A *method* is what a reader would call a criterion: a set of variants, of which
each run takes the one with the largest area on validation data. Nothing is ever chosen on test data, except the best variant in
hindsight, which ``auto`` is held against.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from prunekit.measure import choosing, merit, told
from prunekit.task.evaluation import CLASSIFICATION

Row = Mapping[str, Any]
Variant = tuple[str, str]  # criterion, allocation
Curve = dict[float, float]  # sparsity -> figure of the first measure
Measures = Sequence[Mapping[str, Any]]  # what the measures are


def area(curve: Curve, scale: float = 100.0) -> float:
    """Mean figure over the range of sparsities (trapezoids), in points for a share: 100 is perfect everywhere.

    One sparsity has no range: its figure is what methods are ranked by, and no area (``only_sparsity``).
    """
    points = sorted(curve.items())
    if len(points) == 1:
        return scale * points[0][1]
    total = sum((b - a) * (fa + fb) / 2 for (a, fa), (b, fb) in pairwise(points))
    return scale * total / (points[-1][0] - points[0][0])


def first_of(measures: Measures) -> tuple[str, float, float]:
    """Name of the measure that decides, 1 or -1 by its direction, and what its figures are multiplied with to be shown."""
    first = told(measures)[0]
    return first.name, first.sign, first.scale


class Runs:
    """The one-shot rows of one case and structure, by seed and variant.

    Args:
        rows: of any case and structure; others are passed over.
        methods: name -> criteria that it stands for.
        measures: what figures the rows hold; the first decides.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        case: str,
        structure: str,
        methods: Mapping[str, Sequence[str]],
        measures: Measures = CLASSIFICATION,
    ) -> None:
        self.methods, self.measures = methods, measures
        self.first, self.sign, self.scale = first_of(measures)
        self.by: dict[int, dict[Variant, dict[float, Row]]] = {}
        self.shuffled: dict[int, dict[Variant, dict[float, Row]]] = {}
        for row in rows:
            if (row["case"], row["structure"], row["epochs"], row["repair"]) == (case, structure, 0, ""):
                into = self.shuffled if row["control"] == "shuffled" else self.by
                by_variant = into.setdefault(row["seed"], {})
                by_variant.setdefault((row["criterion"], row["allocation"]), {})[row["sparsity"]] = row
        self.seeds = sorted(self.by)

    def curve(self, seed: int, variant: Variant, split: str = "test") -> Curve:
        return {sparsity: row[split][self.first] for sparsity, row in self.by[seed][variant].items()}

    def area(self, curve: Curve) -> float:
        """``area`` in the first measure's unit."""
        return area(curve, self.scale)

    def variants(self, seed: int, method: str | None = None) -> list[Variant]:
        """Of a method, or all."""
        names = None if method is None else self.methods[method]
        return [variant for variant in self.by[seed] if names is None or variant[0] in names]

    def chosen(self, seed: int, method: str) -> Variant | None:
        """The method's variant with the largest area on validation data; None where the run has none."""
        variants = self.variants(seed, method)
        return max(variants, key=lambda v: self.sign * self.area(self.curve(seed, v, "validation"))) if variants else None

    def auto(self, seed: int) -> dict[float, Row]:
        """At every sparsity the row that does best on validation data, controls left out."""
        found: dict[float, Row] = {}
        order = choosing(told(self.measures))
        for variant in self.variants(seed):
            for sparsity, row in self.by[seed][variant].items():
                if sparsity not in found or merit(order, row["validation"]) > merit(order, found[sparsity]["validation"]):
                    found[sparsity] = row
        return found

    def areas(self, method: str) -> dict[int, float]:
        """Test area by seed."""
        chosen = {seed: self.chosen(seed, method) for seed in self.seeds}
        return {seed: self.area(self.curve(seed, variant)) for seed, variant in chosen.items() if variant is not None}

    def auto_areas(self) -> dict[int, float]:
        return {seed: self.area({s: row["test"][self.first] for s, row in self.auto(seed).items()}) for seed in self.seeds}

    def hindsight(self) -> tuple[Variant, dict[int, float]]:
        """The single variant with the largest mean test area over the seeds: what nobody could have known."""
        shared = [v for v in self.variants(self.seeds[0]) if all(v in self.by[seed] for seed in self.seeds)]
        areas = {v: {seed: self.area(self.curve(seed, v)) for seed in self.seeds} for v in shared}
        best = max(areas, key=lambda v: self.sign * statistics.fmean(areas[v].values()))
        return best, areas[best]

    def shuffled_areas(self, method: str) -> dict[int, float]:
        """Test area of the method's plans with what they keep shuffled within each layer; only where that was measured."""
        found = {}
        for seed in self.seeds:
            variant = self.chosen(seed, method)
            rows = self.shuffled.get(seed, {}).get(variant) if variant else None
            if rows:
                found[seed] = self.area({s: row["test"][self.first] for s, row in rows.items()})
        return found


def spread(values: Iterable[float]) -> dict[str, Any]:
    """``mean``, ``std`` (of a sample; None for one value) and the ``values``."""
    listed = list(values)
    return {
        "mean": statistics.fmean(listed), "std": statistics.stdev(listed) if len(listed) > 1 else None, "values": listed
    }  # fmt: skip


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], sign: float = 1.0) -> dict[str, Any]:
    """How much better ours are than theirs, seed by seed: ``mean``, ``std``, its standard error ``se``, ``values``."""
    differences = [sign * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    found = spread(differences)
    return {**found, "se": found["std"] / math.sqrt(len(differences)) if found["std"] is not None else None}


def summarise(
    rows: Sequence[Row], methods: Mapping[str, Sequence[str]], measures: Measures = CLASSIFICATION
) -> list[dict[str, Any]]:
    """One entry a case and structure, in the rows' order.

    Returns:
        for each: ``case``, ``structure``, ``seeds``; ``methods``: name -> area (of one sparsity: the figure there) as
        ``spread``, with ``shuffled``, the ``variants`` taken by seed, and ``auto_ahead`` (``paired``, auto less the method);
        ``auto``: its area, what it took by seed and sparsity, ``hindsight`` (the best variant in hindsight and its area) and
        ``regret`` (``paired``, hindsight less auto); ``tuned``: after fine-tuning, see ``after_tuning``; ``repaired``: see
        ``after_repair``.
    """
    entries = []
    for case, structure in dict.fromkeys((row["case"], row["structure"]) for row in rows):
        runs = Runs(rows, case, structure, methods, measures)
        auto, (variant, best) = runs.auto_areas(), runs.hindsight()
        by_method = {}
        for method in methods:
            areas = runs.areas(method)
            if areas:
                shuffled = runs.shuffled_areas(method)
                by_method[method] = {
                    **spread(areas.values()),
                    "shuffled": spread(shuffled.values()) if shuffled else None,
                    "variants": {str(seed): runs.chosen(seed, method) for seed in runs.seeds},
                    "auto_ahead": paired(auto, areas, runs.sign),
                }
        entries.append(
            {
                "case": case,
                "structure": structure,
                "seeds": runs.seeds,
                "methods": by_method,
                "auto": {
                    **spread(auto.values()),
                    "taken": {
                        str(seed): {str(s): (row["criterion"], row["allocation"]) for s, row in sorted(runs.auto(seed).items())}
                        for seed in runs.seeds
                    },
                    "hindsight": {"variant": variant, **spread(best.values())},
                    "regret": paired(best, auto, runs.sign),
                },
                "tuned": after_tuning(rows, case, structure, measures),
                "repaired": after_repair(rows, case, structure, measures),
            }
        )
    return entries


def only_sparsity(entry: Mapping[str, Any]) -> float | None:
    """Of an entry of ``summarise``: the sparsity of a structure that was compared at one alone, where figures are no areas."""
    found = {float(sparsity) for by_sparsity in entry["auto"]["taken"].values() for sparsity in by_sparsity}
    return found.pop() if len(found) == 1 else None


def after_tuning(rows: Iterable[Row], case: str, structure: str, measures: Measures = CLASSIFICATION) -> list[dict[str, Any]]:
    """Fine-tuned rows by method, repair and sparsity, each with ``epochs`` and the first measure on test data as ``spread``."""
    first, _, scale = first_of(measures)
    found: dict[tuple[int, str, str, float], list[float]] = {}
    for row in rows:
        if (row["case"], row["structure"]) == (case, structure) and row["epochs"]:
            key = row["epochs"], row["method"], row["repair"], row["sparsity"]
            found.setdefault(key, []).append(scale * row["test"][first])
    return [
        {"epochs": epochs, "method": method, "repair": repair, "sparsity": sparsity, first: spread(values)}
        for (epochs, method, repair, sparsity), values in sorted(found.items())
    ]


def after_repair(
    rows: Iterable[Row], case: str, structure: str, measures: Measures = CLASSIFICATION
) -> dict[str, dict[str, dict[str, Any]]]:
    """Test area of repaired plans by repair and method, as ``spread`` over the seeds where the method was among those looked at.

    Each with the ``sparsities`` that its area is over, and ``unrepaired``: the area of the same plans there without repair
    (None where that was not measured).
    """
    first, _, scale = first_of(measures)
    curves: dict[tuple[str, str], dict[int, Curve]] = {}
    plain: dict[tuple[int, str, str, float], float] = {}
    variants: dict[tuple[str, str, int, float], Variant] = {}
    for row in rows:
        if (row["case"], row["structure"], row["epochs"], row["control"]) != (case, structure, 0, ""):
            continue
        figure, variant = row["test"][first], (row["criterion"], row["allocation"])
        if row["repair"]:
            curves.setdefault((row["repair"], row["method"]), {}).setdefault(row["seed"], {})[row["sparsity"]] = figure
            variants[row["repair"], row["method"], row["seed"], row["sparsity"]] = variant
        else:
            plain[row["seed"], *variant, row["sparsity"]] = figure
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (repair, method), by_seed in curves.items():
        keys = [[(s, (seed, *variants[repair, method, seed, s], s)) for s in curve] for seed, curve in by_seed.items()]
        measured = all(key in plain for curve in keys for _, key in curve)
        before = [area({s: plain[key] for s, key in curve}, scale) for curve in keys] if measured else None
        found.setdefault(repair, {})[method] = {
            **spread(area(curve, scale) for curve in by_seed.values()),
            "sparsities": sorted({s for curve in by_seed.values() for s in curve}),
            "unrepaired": None if before is None else spread(before),
        }
    return found
