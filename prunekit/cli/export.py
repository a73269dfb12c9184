"""prunekit export: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import Json, Overwrite, Quiet
from prunekit.cli.output import Output
from prunekit.cli.verb import verb


@verb(
    after="latency",
    headings={"What is written": ("to", "out", "used_tokens")},
    examples={
        "A folder that transformers loads": "prunekit export runs/bert/pruned/small --to hf small-bert",
        "Without the tokens that the data never use": "prunekit export runs/llama/pruned/small --to hf small-llama --used-tokens",
        "A file for onnxruntime, checked and timed beside torch": "prunekit export runs/digits-cnn/pruned/small "
        "--to onnx small-onnx",
        "A program that torch loads without the model's code": "prunekit export runs/digits-cnn/pruned/small "
        "--to torch-export small-pt2",
        "Its tensors alone": "prunekit export runs/digits-cnn/pruned/small --to state-dict small-tensors",
    },
)
def export(
    pruned: Annotated[Path, typer.Argument(metavar="RUN/pruned/NAME", help="Folder of a pruned model.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write: new, empty, or an earlier export.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="hf, onnx, torch-export, state-dict, or module:format.")],
    used_tokens: Annotated[bool, typer.Option("--used-tokens", help="With hf: leave out tokens that the run's data never use.")]
    = False,
    overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a pruned model in a form that others load.

    It is read back and compared with the pruned model before the folder takes its place.
    """
    from prunekit.exporting import format_of
    from prunekit.verbs.exporting import export_pruned
    from prunekit.verbs.pruned_folder import run_of

    output = Output(quiet, as_json)
    opened = open_run(run_of(pruned), None)
    format_of(to)
    with output.working():
        result = export_pruned(opened, pruned, to, out, overwrite, used_tokens)
    output.show(show_export, result)
    output.finish(result)


def show_export(result: dict[str, Any]) -> None:
    from prunekit.report.measures import three
    from prunekit.report.terminal.tables import again

    print(f"export: {result['folder']} holds {', '.join(result['files'])}{again(result['reused'])}")
    print(f"  loads with {result['loads_with']}")
    if result["difference"] is None:
        print("  answers were not compared: the run has no data; the weights are the pruned model's")
    else:
        sizes = " and ".join(map(str, result["samples"]))
        print(
            f"  read back, with {sizes} samples: differs by {result['difference']:.2g} at most ({result['tolerance']:g} allowed)"
        )
    for name, axes in result.get("axes", {}).items():
        print(f"  {name}: {' × '.join(map(str, axes))}")
    for size, speed in result.get("speed", {}).items():
        dense, ours = three(speed["dense_ms"]), three(speed["pruned_ms"])
        print(f"  batch of {size}: {ours} ms in onnxruntime, {dense} ms in torch")
    for note in result["notes"]:
        print(f"  note: {note}")
