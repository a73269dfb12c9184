"""The kernel's account: outputs of the dense and the pruned models, rebuilt from the training path."""

from __future__ import annotations

from typing import Any

from prunekit.report.plots import inline, layers_figure
from prunekit.report.sections.section import RunArtifacts, Section


def _values(run: RunArtifacts) -> dict[str, Any] | None:
    explained = {name: e.kernel for name, e in run.evaluations.items() if e.kernel is not None}
    if not explained:
        return None
    return {"explained": explained, "steps": run.trajectory["steps"], "picture": inline(layers_figure(explained))}


SECTION = Section(
    title="The kernel's account",
    values=_values,
    template='{% include "sections/kernel_account.html.j2" %}',
)
