"""prunekit run: parses, calls, prints."""

from __future__ import annotations

from prunekit.cli.opening import read_recipe
from prunekit.cli.options import (
    Device,
    Json,
    Out,
    Overwrite,
    Quiet,
    RecipeFile,
    Seed,
)
from prunekit.cli.output import Output
from prunekit.cli.panels import panels
from prunekit.cli.top import app


@app.command(cls=panels({}), epilog="Example: prunekit run recipes/digits-cnn.yaml --out runs/digits-cnn")
def run(
    recipe: RecipeFile, out: Out, seed: Seed = None, device: Device = None, overwrite: Overwrite = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Do all of it: train, score, compare, prune, eval, report."""
    from prunekit.verbs.reporting import run_recipe

    output = Output(quiet, as_json)
    checked = read_recipe(recipe, out, seed, device)
    with output.working(out):
        result = run_recipe(checked, out, overwrite, output.show, output.note)
    output.finish(result)
