"""prunekit eval: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit import ranks
from prunekit.cli.opening import open_run
from prunekit.cli.options import Device, Json, Overwrite, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError


@verb(
    name="eval",
    after="prune",
    shared=True,
    headings={
        "The lm-evaluation-harness": ("lm_eval", "lm_eval_include", "lm_eval_limit"),
        "Models larger than one device": ("device_map",),
    },
    examples={
        "What a pruned model lost, and how fast it is": "prunekit eval runs/digits-cnn/pruned/small",
        "A language model in the lm-evaluation-harness as well": "prunekit eval runs/llama/pruned/small --lm-eval "
        "hellaswag,arc_easy",
        "Models that do not fit on one device": "prunekit eval runs/llama/pruned/small --device-map auto",
    },
)
def eval_(
    pruned: Annotated[Path, typer.Argument(metavar="RUN/pruned/NAME", help="Folder of a pruned model.")],
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of the harness, with commas; dense and pruned in turn.")
    ] = None,
    lm_eval_include: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with tasks of your own (YAML).")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Documents a task; all by default.")] = None,
    device_map: Annotated[
        str | None, typer.Option(metavar="auto|JSON", help="Spread weights over devices, memory and disk, as accelerate does.")
    ] = None,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a pruned model on test data.

    Figures, sizes and speed beside the dense model's, and the model rebuilt from the training path.
    """
    from prunekit.report.terminal.evaluating import show_evaluation
    from prunekit.verbs.evaluating import evaluate
    from prunekit.verbs.onnx_latency import with_onnx
    from prunekit.verbs.placement import device_map_of
    from prunekit.verbs.pruned_folder import run_of

    if lm_eval is None and (lm_eval_include is not None or lm_eval_limit is not None):
        raise UsageError("--lm-eval-include and --lm-eval-limit go with --lm-eval TASKS")
    if lm_eval is not None and ranks.size() > 1:
        raise UsageError("--lm-eval works in one process; start it without torchrun")
    if lm_eval is not None and device_map is not None:
        raise UsageError("--lm-eval runs on one device; leave --device-map out")
    if device is not None and device_map is not None:
        raise UsageError("--device is one device, --device-map several; leave one of them out")
    if device_map is not None and ranks.size() > 1:
        raise UsageError("--device-map spreads models of one process; start it without torchrun")
    if lm_eval is not None:
        from prunekit.verbs.harness import LmEval

    places = None if device_map is None else device_map_of(device_map)
    output = Output(quiet, as_json)
    opened = open_run(run_of(pruned), device)
    with output.working(opened.path):
        harness = None if lm_eval is None else LmEval(opened, lm_eval.split(","), lm_eval_include, lm_eval_limit)
        record, reused = evaluate(opened, pruned, overwrite, places)
        record = with_onnx(opened, record, pruned)
        if harness is not None:
            record = harness.added_to(record, pruned)
    output.show(show_evaluation, (pruned.resolve().name, record, reused))
    output.finish({**record.content(), "reused": reused})
