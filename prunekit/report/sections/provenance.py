"""Where a run comes from: its trajectory, training, scores and recipe. Every run has this section."""

from __future__ import annotations

from typing import Any

from prunekit.report.plots import inline, training_figure
from prunekit.report.sections.section import RunArtifacts, Section
from prunekit.report.tables import trained


def _values(run: RunArtifacts) -> dict[str, Any]:
    training = run.training
    return {
        "trajectory": run.trajectory,
        "training": training,
        "trained": trained(training) if training else None,
        "picture": inline(training_figure(training.losses)) if training else None,
        "scores": run.scores,
        "recipe": run.recipe,
    }


SECTION = Section(
    title="Where it comes from",
    values=_values,
    template="""\
{% from "numbers.html.j2" import num %}
<p>Trajectory: {{ num(trajectory.steps) }} steps of {{ num(trajectory.coordinates) }} coordinates,
{{ "%.1f"|format(trajectory.bytes / 1e6) }} MB, hash <code>{{ trajectory.hash }}</code>.</p>
{% if training %}<p>Training took {{ "%.1f"|format(training.cost.seconds) }} s
{%- if trained %}; validation {{ trained[0].title }} {{ trained[0].spaced(trained[1].validation) }}
{%- if training.samples and training.samples.validation %} on {{ num(training.samples.validation) }} samples{% endif %}
{%- endif %}.</p>
<img alt="Training loss by epoch" src="{{ picture }}">
{%- else %}<p>The run has no train.json, which prunekit train writes: its losses and time are not known.</p>{% endif %}
<div class="scroll"><table><tr><th>criterion</th><th>seconds</th><th>digest of the scores</th></tr>
{% for s in scores %}
<tr><td>{{ s.criterion }}</td><td>{{ "%.2f"|format(s.seconds) }}</td><td><code>{{ s.digest }}</code></td></tr>
{% endfor %}</table></div>
<details><summary>The resolved recipe</summary><pre>{{ recipe }}</pre></details>
""",
)
