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


def card(loading: str, notes: Sequence[str], removed: Sequence[str], measured: Sequence[str]) -> str:
    """The text.

    Args:
        loading: Python that loads the folder.
        notes: sentences on what the folder is and is not.
        removed, measured: lines on what was pruned and how it was measured.
    """
    lines = ["---", "library_name: transformers", "tags:", "- pruning", "- prunekit", "---", "", "# A pruned model", ""]
    lines += [f"Made with prunekit {__version__}.", "", "```python", loading, "```", ""]
    lines += [line for note in notes for line in (f"{note[:1].upper()}{note[1:]}.", "")]
    lines += ["## What was pruned", "", *removed, ""]
    lines += ["## How it was measured", "", *measured]
    return "\n".join(lines) + "\n"


def removed(manifest: Manifest | None) -> list[str]:
    """What a manifest says was pruned."""
    if manifest is None:
        return ["This was not written down."]
    told = manifest.provenance
    shares = manifest.facts["sparsity"]
    lines = [
        f"- structure: {manifest.structure}",
        f"- criterion: `{told['criterion']}`, allocation: {told['allocation']}",
        f"- removed: {100 * shares['prunable']:.2f} % of the prunable parameters, {100 * shares['all']:.2f} % of all",
    ]
    refined = [key for key in ("refine", "compensate", "finetune", "schedule") if told.get(key) or manifest.facts.get(key)]
    return lines + ([f"- steps beside it: {', '.join(refined)}"] if refined else [])


def measured(manifest: Manifest | None, record: EvaluationRecord | None) -> list[str]:
    """What eval found, or what ``prunekit.compress`` did."""
    if record is not None:
        lines = table(record.test_samples, record.measures, record.dense, record.pruned, SIZES)
        for size, times in record.latency["batches"].items():
            lines.append(f"| ms, batch of {size} | {times['dense_ms']:.3f} | {times['pruned_ms']:.3f} |")
        return [*lines, "", f"Times: {record.latency['machine']}."]
    report = None if manifest is None else manifest.facts.get("report")
    if report is None:
        return UNMEASURED
    dense, pruned = ({**report[name], **report["sizes"][name]} for name in ("dense", "pruned"))
    return table(report["samples"]["test"], report["measures"], dense, pruned, SIZES[:-1])


def table(
    samples: int, measures: Sequence[Any], dense: Mapping[str, Any], pruned: Mapping[str, Any], sizes: Sequence[str] = ()
) -> list[str]:
    """Figures of the dense model beside the pruned one's, as lines of Markdown."""
    lines = [f"On {samples:,} test samples, the dense model beside the pruned one:", ""]
    lines += ["| | dense | pruned |", "|---|---|---|"]
    for measure in shown(measures):
        lines.append(f"| {measure.title} | {_figure(dense, measure)} | {_figure(pruned, measure)} |")
    return lines + [f"| {name} | {int(dense[name]):,} | {int(pruned[name]):,} |" for name in sizes]


def _figure(figures: Mapping[str, Any], measure: Shown) -> str:
    return measure.text(figures[measure.name]) if measure.name in figures else ""
