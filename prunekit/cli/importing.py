"""prunekit import: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.data_options import NAMES, Data, DataArgs, Label, Length, SkipBad, Stride, Text, data_content
from prunekit.cli.opening import recipe_of
from prunekit.cli.options import Device, Json, Out, Overwrite, Quiet, Seed, json_object
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError
from prunekit.remote import placed

PANELS = {
    "The model": ("model", "model_args", "hf", "auto", "weights", "trajectory"),
    "Its data and what it is for": (*NAMES, "task", "loss"),
    "What may be pruned": ("ignore", "include", "attention"),
}


@verb(
    name="import",
    after="train",
    headings=PANELS,
    examples={
        "A trained model, and the data to score and judge it": "prunekit import --model my_module:build --data my_module:data "
        "--weights model.safetensors --out runs/theirs",
        "A Hugging Face folder, whose config says the class and the task": "prunekit import --hf my-model --data my_module:data "
        "--out runs/theirs",
        "The same with data in a file": "prunekit import --hf my-model --data reviews.csv --text text --label label "
        "--out runs/theirs",
        "A base model and what was tuned from it, or its LoRA adapter, as a path": "prunekit import --hf base --hf tuned "
        "--data my_module:data --out runs/theirs",
        "Its weights alone, for criteria that need no data": "prunekit import --model my_module:build "
        "--weights model.safetensors --out runs/theirs",
        "Checkpoints of its training, in order, as a path": "prunekit import --model my_module:build --data my_module:data "
        "--weights first.safetensors --weights last.safetensors --out runs/theirs",
        "What a Recorder left of a training loop": "prunekit import --model my_module:build --data my_module:data "
        "--trajectory runs/plain/trajectory --out runs/plain",
    },
)
def import_(
    out: Out,
    model: Annotated[str | None, typer.Option(help="Import path of the model factory, module:function.")] = None,
    hf: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Instead: config.json + safetensors, or an adapter; repeat it, in order, for a path."),
    ] = None,
    auto: Annotated[str | None, typer.Option(help="With --hf: an AutoModelFor… of transformers for its class.")] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint (safetensors, shards, .pt); repeat it, in order, for a path.")
    ] = None,
    trajectory: Annotated[
        str | None, typer.Option(metavar="DIR", help="What Recorder left in a training loop of yours, instead of weights.")
    ] = None,
    model_args: Annotated[str, typer.Option(metavar="JSON", help="The factory's keyword arguments.")] = "{}",
    data: Data = None, data_args: DataArgs = "{}", text: Text = None, label: Label = None,
    length: Length = None, stride: Stride = None, skip_bad: SkipBad = False,
    task: Annotated[str | None, typer.Option(help="What it is for: causal_lm, … or module:task; JSON with options.")] = None,
    loss: Annotated[str | None, typer.Option(help="Import path of a loss; the task's own by default.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of parameters not to prune; repeatable.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of parameters to prune that are no layer's weights.")] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(metavar="JSON", help="Layers of an attention: q, k, v (or qkv), o, heads, or module:function; repeatable."),
    ] = None,
    seed: Seed = None, device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Bring in a model that was trained elsewhere.

    What is brought in are checkpoints of it, or what was recorded of its training.
    """
    from prunekit.verbs.pretrained import folders_of, import_folders, model_section
    from prunekit.verbs.recorded import import_recording
    from prunekit.verbs.training import import_run

    folders = folders_of(hf) if hf else []
    _check_sources(model, folders, weights or [], trajectory)
    if folders and model_args != "{}":
        raise UsageError("--model-args are a factory's; --hf has none")
    if auto is not None and not folders:
        raise UsageError("--auto goes with --hf")

    content: dict[str, Any] = {
        "model": model_section(folders, auto) if folders else {"factory": model, "args": json_object(model_args, "--model-args")},
        **({} if task is None else {"task": json_object(task, "--task") if task.startswith("{") else task}),
        **({} if loss is None else {"loss": loss}),
        "prunable": {"ignore": ignore or [], "include": include or []},
        "structure": {"attention": [_attention(one) for one in attention or []]},
    }
    told = data_content(data, data_args, text=text, label=label, length=length, stride=stride, skip_bad=skip_bad)
    if told is not None:
        content["data"] = told
    output = Output(quiet, as_json)
    checked = recipe_of(content, "import", out, seed, device)
    with output.working(out):
        if trajectory is not None:
            result = import_recording(checked, placed(trajectory), out, overwrite, output.note)
        elif weights:
            result = import_run(checked, weights, out, overwrite, output.note)
        else:
            result = import_folders(checked, folders, out, overwrite, output.note)
    output.show(show_imported, result)
    output.finish(result)


def show_imported(result: dict[str, Any]) -> None:
    from prunekit.report.terminal.tables import again

    recorded = f"a recorded path of {result['steps']:,} steps" if "steps" in result else None
    kind = recorded or (
        f"a path of {result['states']} checkpoints" if result["path"] else "one checkpoint (no path: influence needs two or more)"
    )
    task = f", task {result['task']}" if result["task"] else ""
    print(f"import: {result['coordinates']:,} coordinates, {kind}{task}{again(result['reused'])}")


def _check_sources(model: str | None, folders: list[Path], weights: list[Path], trajectory: str | None) -> None:
    """Raises UsageError unless one model is named, and one source of its numbers."""
    if (model is None) == (not folders):
        raise UsageError("import needs --model module:function, or --hf DIR, a folder with config.json; one of them")
    if len(folders) > 1 and (weights or trajectory is not None):
        raise UsageError(f"--hf gives {len(folders)} checkpoints already; give --weights or --trajectory with one folder")
    if (trajectory is not None and weights) or (trajectory is None and not weights and not folders):
        raise UsageError(
            "import needs --weights FILE, of one checkpoint or more, or --trajectory DIR, what Recorder left; one of them"
        )


def _attention(text: str) -> dict[str, Any] | str:
    """The mapping, or the import path of a function that makes some."""
    return json_object(text, "--attention") if text.lstrip().startswith("{") or ":" not in text else text
