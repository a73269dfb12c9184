"""The task's measure over the size of pruned models, with error bars and the dense model's line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.report.measures import deciding
from prunekit.report.plots import inline
from prunekit.report.sections.section import Overview, RunArtifacts
from prunekit.report.size_plot import size_figure


def _values(runs: Sequence[RunArtifacts]) -> dict[str, Any] | None:
    found = {run.name: run.evaluations for run in runs if run.evaluations}
    if not found:
        return None
    every = [e for evaluations in found.values() for e in evaluations.values()]
    measures = ", ".join(dict.fromkeys(deciding(e.measures).plain for e in every))
    return {
        "measures": measures,
        "heading": measures[0].upper() + measures[1:],
        "errors": any(e.lost and "standard_error" in e.lost["test"] for e in every),
        "picture": inline(size_figure(found)),
    }


OVERVIEW = Overview(
    title="{{ heading }} against size",
    values=_values,
    template="""\
<img alt="Test {{ measures }} of the dense and the pruned models over their size" src="{{ picture }}">
<p class="note">Test data. {% if errors %}A bar is one standard error of the difference to the dense model, over the same samples.
{%- else %}Older evaluations have no error bars.{% endif %}</p>
""",
)
