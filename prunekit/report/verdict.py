"""The verdict on a pruned model: one line that a person can repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunekit.explain import EvaluationRecord
from prunekit.measure import Lost
from prunekit.report.measures import Shown, deciding


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of a pruned model; a part that is not known is left out of the line.

    Attributes:
        kept, total: parameters that stay, and those of the dense model.
        measure: the task's first.
        lost: split -> what was lost there.
        classes: those that it was pruned for.
        asked: name and value of the budget it was pruned to, and what was reached.
        planned: nothing was pruned yet.
    """

    kept: int
    total: int
    measure: Shown
    lost: Mapping[str, Lost] = field(default_factory=dict)
    classes: Sequence[int] = ()
    asked: tuple[str, float, float] | None = None
    planned: bool = False

    def text(self) -> str:
        """Such as ``16,980 of 56,394 parameters stay; validation accuracy 97.8 → 96.3 (1.5 ± 0.6 points lost, asked 1)``."""
        name, value, reached = self.asked or ("", 0.0, 0.0)
        told = [f"{self.kept:,} of {self.total:,} parameters {'would stay' if self.planned else 'stay'}"]
        if name == "max_params":
            told[0] += f" (asked {value:,.0f})"
        if name in SIZES:
            told.append(f"{reached:,.0f} {SIZES[name]} (asked {value:,.0f})")
        for split, lost in self.lost.items():
            told.append(self._lost(split, lost, f", asked {value:g}" if name in DROPS and split == "validation" else ""))
        return "; ".join(told)

    def _lost(self, split: str, found: Lost, asked: str) -> str:
        measure = self.measure
        what = f"{split} {measure.brief}" + (f" on classes {', '.join(map(str, self.classes))}" if self.classes else "")
        if "dense" not in found:
            return f"{what} {measure.number(found['pruned'])}"
        told = f"{what} {measure.number(found['dense'])} → {measure.number(found['pruned'])}"
        if "lost" not in found:
            return told
        lost, points = found["lost"], measure.unit == "%"
        error = f" ± {_amount(found['standard_error'], points)}" if "standard_error" in found else ""
        unit = " points" if points else f" {measure.unit}" if measure.unit else ""
        return f"{told} ({_amount(abs(lost), points)}{error}{unit} {'gained' if lost < 0 else 'lost'}{asked})"


SIZES = {"max_macs": "MACs a sample", "max_bytes": "bytes on disk"}
DROPS = ("max_accuracy_drop", "max_drop")


def of_pruned(result: Mapping[str, Any], measure: Shown) -> Verdict:
    """The verdict on what ``prune`` did."""
    lost = {"validation": result["validation"]} if result["validation"] is not None else {}
    return Verdict(
        kept=result["parameters"]["kept"],
        total=result["parameters"]["total"],
        measure=measure,
        lost={} if result.get("dry_run") else lost,
        classes=result["classes"],
        asked=None if not result["budget"] else (*next(iter(result["budget"].items())), result["reached"]),
        planned=bool(result.get("dry_run")),
    )


def of_evaluation(found: EvaluationRecord) -> Verdict:
    """The verdict on what ``eval`` measured; of an older file without what was lost."""
    total = int(found.dense["parameters"])
    lost: dict[str, Lost] = {}
    if found.lost is not None:
        lost = {"validation": found.lost["validation"]} if "validation" in found.lost else {}
        lost["test"] = found.lost["test"]
    return Verdict(
        kept=round(total * (1 - found.sparsity["all"])),
        total=total,
        measure=deciding(found.measures),
        lost=lost,
        classes=found.asked_classes["classes"] if found.asked_classes else (),
        asked=None if found.budget is None else (found.budget["name"], found.budget["asked"], found.budget["reached"]),
    )


def _amount(value: float, points: bool) -> str:
    return f"{value:.1f}" if points else f"{value:.2g}"
