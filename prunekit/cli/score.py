"""prunekit score: parses, calls, prints."""

from __future__ import annotations

from typing import Annotated

import typer

from prunekit import ranks
from prunekit.cli.opening import open_run, open_spread
from prunekit.cli.options import CRITERION_HELP, Device, Json, Overwrite, Quiet, RunFolder, Seed
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError

PANELS = {
    "What is scored": ("criterion", "skip_unfit"),
    "How influence looks at the path": (
        "target", "share", "aggregation", "quadrature", "nodes", "early", "tolerance", "stride", "memory", "max_error",
    ),
    "Models larger than one device": ("device_map",),
}  # fmt: skip


@verb(
    after="import",
    headings=PANELS,
    shared=True,
    examples={
        "What the recipe lists": "prunekit score runs/digits-cnn --criterion all",
        "Two criteria": "prunekit score runs/digits-cnn --criterion influence --criterion magnitude",
        "One with options": "prunekit score runs/digits-cnn -c 'influence(target=margin,aggregation=l2)'",
        "A composed one": "prunekit score runs/digits-cnn -c 'influence^0.25*magnitude^0.75'",
        "A model that does not fit on one device": "prunekit score runs/llama -c taylor --device-map auto",
        "No file unless the error is small": "prunekit score runs/digits-cnn -c influence --nodes 4 --max-error 0.05",
    },
)
def score(
    run: RunFolder,
    criterion: Annotated[list[str], typer.Option("--criterion", "-c", help=CRITERION_HELP)],
    quadrature: Annotated[str | None, typer.Option(help="ranking or reconstruction.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="nodes a piece, for ranking.")] = None,
    early: Annotated[tuple[int, int] | None, typer.Option(metavar="STEPS NODES", help="nodes in early steps.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="allowed error, for reconstruction.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="kept states a piece.")] = None,
    share: Annotated[str | None, typer.Option(help="kernel, regularisation, whole or survival.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="l1, l2, square or abs_mean (of a signed mean), over samples.")] = None,
    memory: Annotated[str | None, typer.Option(help="for scores in work, such as 512MiB.")] = None,
    max_error: Annotated[float | None, typer.Option(help="write nothing if the estimated error is larger.")] = None,
    target: Annotated[str | None, typer.Option(help="outputs, log_prob, margin, loss, or module:function.")] = None,
    skip_unfit: Annotated[bool, typer.Option("--skip-unfit", help="by magnitude what wanda, obs, kfac, flap cannot.")] = False,
    device_map: Annotated[
        str | None, typer.Option(metavar="auto|JSON", help="Weights lie on devices or the disk; a block computes at a time.")
    ] = None,
    seed: Seed = None, device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Score every prunable weight by one or more criteria."""
    from prunekit.imports import load_object
    from prunekit.report.terminal.comparing import show_scores
    from prunekit.verbs.scoring import score_run

    if device is not None and device_map is not None:
        raise UsageError("--device is one device, --device-map several; leave one of them out")
    if device_map is not None and ranks.size() > 1:
        raise UsageError("--device-map spreads the model of one process; start it without torchrun")
    output = Output(quiet, as_json)
    opened = open_run(run, device) if device_map is None else open_spread(run, device_map)
    with output.working(run):
        given = {
            "quadrature": quadrature, "nodes": nodes, "early": early, "tolerance": tolerance, "stride": stride, "share": share,
            "aggregation": aggregation, "memory": memory, "skip_unfit": skip_unfit or None,
        }  # fmt: skip
        settings = opened.recipe.score.model_dump(mode="json") | {k: v for k, v in given.items() if v is not None}
        options = type(opened.recipe).of({**opened.recipe.model_dump(mode="json"), "score": settings}, "score").score.options()
        if target is not None:
            options["target"] = load_object(target, "--target") if ":" in target else target
        if seed is not None:
            options["seed"] = seed
        result = score_run(opened, criterion, overwrite, opened.asked(**options), max_error)
    output.show(show_scores, result)
    output.finish(result)
