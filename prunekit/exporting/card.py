"""README.md of an exported folder of transformers: what was pruned, by what, measured how; figures from the run alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.apply import Manifest
from prunekit.explain import EvaluationRecord
from prunekit.report.measures import Shown, shown
from prunekit.version import __version__

UNMEASURED = ["It was not measured on test data when this was written; `prunekit eval` does that."]
SIZES = ("parameters", "nonzero", "macs", "bytes")


def card(manifest: Manifest | None, evaluation: EvaluationRecord | None, loading: str, notes: list[str]) -> str:
    """The text.

    Args:
        loading: Python that loads the folder.
        notes: sentences on what the folder is and is not.
    """
    lines = ["---", "library_name: transformers", "tags:", "- pruning", "- prunekit", "---", "", "# A pruned model", ""]
    lines += [f"Made with prunekit {__version__}.", "", "```python", loading, "```", ""]
    lines += [line for note in notes for line in (f"{note[:1].upper()}{note[1:]}.", "")]
    lines += ["## What was pruned", "", *(_removed(manifest) if manifest is not None else ["This was not written down."]), ""]
    lines += ["## How it was measured", "", *_measured(manifest, evaluation)]
    return "\n".join(lines) + "\n"


def _removed(manifest: Manifest) -> list[str]:
    told = manifest.provenance
    shares = manifest.facts["sparsity"]
    lines = [
        f"- structure: {manifest.structure}",
        f"- criterion: `{told['criterion']}`, allocation: {told['allocation']}",
        f"- removed: {100 * shares['prunable']:.2f} % of the prunable parameters, {100 * shares['all']:.2f} % of all",
    ]
    refined = [key for key in ("refine", "compensate", "finetune", "schedule") if told.get(key) or manifest.facts.get(key)]
    return lines + ([f"- steps beside it: {', '.join(refined)}"] if refined else [])


def _measured(manifest: Manifest | None, record: EvaluationRecord | None) -> list[str]:
    """What eval found, or what ``prunekit.compress`` did."""
    if record is not None:
        lines = _table(record.test_samples, record.measures, record.dense, record.pruned, SIZES)
        for size, times in record.latency["batches"].items():
            lines.append(f"| ms, batch of {size} | {times['dense_ms']:.3f} | {times['pruned_ms']:.3f} |")
        return [*lines, "", f"Times: {record.latency['machine']}."]
    report = None if manifest is None else manifest.facts.get("report")
    if report is None:
        return UNMEASURED
    dense, pruned = ({**report[name], **report["sizes"][name]} for name in ("dense", "pruned"))
    return _table(report["samples"]["test"], report["measures"], dense, pruned, SIZES[:-1])


def _table(
    samples: int, measures: Sequence[Any], dense: Mapping[str, Any], pruned: Mapping[str, Any], sizes: Sequence[str]
) -> list[str]:
    lines = [f"On {samples:,} test samples, the dense model beside the pruned one:", ""]
    lines += ["| | dense | pruned |", "|---|---|---|"]
    for measure in shown(measures):
        lines.append(f"| {measure.title} | {_figure(dense, measure)} | {_figure(pruned, measure)} |")
    return lines + [f"| {name} | {int(dense[name]):,} | {int(pruned[name]):,} |" for name in sizes]


def _figure(figures: Mapping[str, Any], measure: Shown) -> str:
    return measure.text(figures[measure.name]) if measure.name in figures else ""
