"""prunekit run: parses, calls, prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prunekit.cli.opening import read_recipe
from prunekit.cli.options import Device, Json, Out, Overwrite, Quiet, RecipeFile, Seed
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    after="report",
    examples={
        "All that a recipe says": "prunekit run recipes/digits-cnn.yaml --out runs/digits-cnn",
        "Anew, in place of what another recipe made": "prunekit run recipes/digits-cnn.yaml --out runs/digits-cnn --overwrite",
    },
)
def run(
    recipe: RecipeFile, out: Out, seed: Seed = None, device: Device = None, overwrite: Overwrite = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Do all of it: train, score, compare, prune, eval, report."""
    from prunekit.cli.report import show_report
    from prunekit.report.terminal.comparing import show_comparison, show_scores
    from prunekit.report.terminal.evaluating import show_evaluation, show_verdicts
    from prunekit.report.terminal.pruning import show_pruned
    from prunekit.report.terminal.training import show_trained
    from prunekit.verbs.reporting import run_recipe

    prints: dict[str, Callable[[Any], None]] = {
        "train": show_trained, "score": show_scores, "compare": show_comparison, "prune": show_pruned, "eval": show_evaluation,
        "report": show_report, "verdict": show_verdicts,
    }  # fmt: skip
    output = Output(quiet, as_json)
    checked = read_recipe(recipe, out, seed, device)
    with output.working(out):
        result = run_recipe(checked, out, overwrite, lambda verb, found: output.show(prints[verb], found), output.note)
    output.finish(result)
