"""prunekit train: parses, calls, prints."""

from __future__ import annotations

from prunekit.cli.opening import read_recipe
from prunekit.cli.options import Device, Json, Out, Overwrite, Quiet, RecipeFile, Seed
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    after="",
    examples={
        "Train what a recipe says": "prunekit train recipes/digits-cnn.yaml --out runs/digits-cnn",
        "The same from another seed": "prunekit train recipes/digits-cnn.yaml --seed 1 --out runs/seed-1",
    },
)
def train(
    recipe: RecipeFile, out: Out, seed: Seed = None, device: Device = None, overwrite: Overwrite = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Train the recipe's model and record every step."""
    from prunekit.report.terminal.training import show_trained
    from prunekit.verbs.training import train_run, training_facts

    output = Output(quiet, as_json)
    checked = read_recipe(recipe, out, seed, device)
    with output.working(out):
        record, reused = train_run(checked, out, overwrite, output.note)
    output.show(show_trained, (record, reused))
    output.finish(training_facts(out, record, reused))
