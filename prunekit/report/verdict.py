"""The verdict on a pruned model: one line that a person can repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunekit.explain import EvaluationRecord
from prunekit.measure import Lost, Speed, noisy
from prunekit.report.measures import Shown, deciding, three


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of a pruned model; a part that is not known is left out of the line.

    Attributes:
        kept, total: parameters that stay, and those of the dense model.
        measure: the task's first.
        lost: split -> what was lost there.
        classes: those that it was pruned for.
        asked: name and value of the budget it was pruned to, and what was reached.
        speed: beside the dense model.
        why: a reason why much less computing is hardly faster.
        planned: nothing was pruned yet.
    """

    kept: int
    total: int
    measure: Shown
    lost: Mapping[str, Lost] = field(default_factory=dict)
    classes: Sequence[int] = ()
    asked: tuple[str, float, float] | None = None
    speed: Speed | None = None
    why: str = ""
    planned: bool = False

    def text(self) -> str:
        """Such as ``16,980 of 56,394 parameters stay; validation accuracy 97.8 → 96.3 (1.5 ± 0.6 points lost, asked 1)``."""
        name, value, reached = self.asked or ("", 0.0, 0.0)
        told = [f"{self.kept:,} of {self.total:,} parameters {'would stay' if self.planned else 'stay'}"]
        if name == "max_params":
            told[0] += f" (asked {value:,.0f})"
        if name in SIZES:
            told.append(f"{reached:,.0f} {SIZES[name]} (asked {value:,.0f})")
        told += [self._lost(split, lost) for split, lost in self.lost.items() if split != "test"]
        if self.speed is not None:
            told.append(self._speed(self.speed))
        elif name in TIMES:
            told.append(f"{three(reached)}{TIMES[name]} (asked {value:g})")
        told += [self._lost(split, lost) for split, lost in self.lost.items() if split == "test"]
        return "; ".join(told) + (f". Fewer MACs, but hardly faster: {self.why}" if self.why else "")

    def _speed(self, found: Speed) -> str:
        name, value, reached = self.asked or ("", 0.0, 0.0)
        ms = three(found["pruned_ms"]) + " ms"
        asked = ""
        if name in TIMES:
            needed = value if name == "speedup" else found["speedup"] * reached / value
            missed = ", within the spread" if found["high"] >= needed else ", not reached"
            asked = f"; asked {value:g}{missed if found['speedup'] < needed else ''}"
        if name == "max_latency_ms":
            ms = f"{three(reached)} ms"
        told = f"{three(found['speedup'])}× at batch {found['batch']}"
        between = f"{three(found['low'])}–{three(found['high'])}"
        return f"{told} ({ms}, {between}×{', a noisy machine' if noisy(found) else ''}{asked})"

    def _lost(self, split: str, found: Lost) -> str:
        measure = self.measure
        name, value, _ = self.asked or ("", 0.0, 0.0)
        asked = f", asked {value:g}" if name in DROPS and split == "validation" else ""
        what = f"{split} {measure.brief}" + (f" on classes {', '.join(map(str, self.classes))}" if self.classes else "")
        if "dense" not in found:
            return f"{what} {measure.number(found['pruned'])}"
        told = f"{what} {measure.number(found['dense'])} → {measure.number(found['pruned'])}"
        if "lost" not in found:
            return told
        lost, points = found["lost"], measure.unit == "%"
        error = f" ± {amount(found['standard_error'], points)}" if "standard_error" in found else ""
        unit = " points" if points else f" {measure.unit}" if measure.unit else ""
        return f"{told} ({amount(abs(lost), points)}{error}{unit} {'gained' if lost < 0 else 'lost'}{asked})"


SIZES = {"max_macs": "MACs a sample", "max_bytes": "bytes on disk"}
TIMES = {"max_latency_ms": " ms", "speedup": "×"}
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
        speed=result.get("speed"),
        planned=bool(result.get("dry_run")),
    )


def of_evaluation(found: EvaluationRecord) -> Verdict:
    """The verdict on what ``eval`` measured; of an older file without what was lost."""
    total = int(found.dense["parameters"])
    lost: dict[str, Lost] = {}
    if found.lost is not None:
        lost = {"validation": found.lost["validation"]} if "validation" in found.lost else {}
        lost["test"] = found.lost["test"]
    batch, times = next(reversed(found.latency["batches"].items()), ("", {}))
    speed, budget = _speed(batch, times), found.budget
    asked = None if budget is None else (budget["name"], budget["asked"], budget["reached"])
    if asked is not None and speed is not None and asked[0] in TIMES:  # measured anew, beside the dense model of now
        asked = (asked[0], asked[1], speed["speedup"] if asked[0] == "speedup" else speed["pruned_ms"])
    return Verdict(
        kept=round(total * (1 - found.sparsity["all"])),
        total=total,
        measure=deciding(found.measures),
        lost=lost,
        classes=found.asked_classes["classes"] if found.asked_classes else (),
        asked=asked,
        speed=speed,
        why=found.latency.get("why", {}).get(batch, ""),
    )


def _speed(batch: str, times: Mapping[str, float]) -> Speed | None:
    """None of an older file, which does not tell the interval."""
    if not {"speedup", "low", "high", "rounds"} <= times.keys():
        return None
    return {
        "batch": int(batch), "dense_ms": times["dense_ms"], "pruned_ms": times["pruned_ms"], "speedup": times["speedup"],
        "low": times["low"], "high": times["high"], "rounds": int(times["rounds"]),
    }  # fmt: skip


def amount(value: float, points: bool) -> str:
    """What was lost or its error, as verdicts write it: ``1.5`` points, ``0.023`` of another unit."""
    return f"{value:.1f}" if points else f"{value:.2g}"
