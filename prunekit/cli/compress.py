"""prunekit compress: parses, calls, prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit import ranks
from prunekit.cli.data_options import NAMES, Data, DataArgs, Label, Length, SkipBad, Stride, Text, data_content
from prunekit.cli.opening import recipe_of
from prunekit.cli.options import (
    STRUCTURE_HELP,
    Compensate,
    Device,
    Distill,
    Finetune,
    Json,
    Lora,
    Overwrite,
    Quiet,
    Rate,
    RecordEvery,
    RefineTokens,
    Seed,
    Temperature,
    TokensOption,
    TuneTokens,
    json_object,
)
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError

PANELS = {
    "Its data and what it is for": (*NAMES, "task", "loss", "auto"),
    "How much goes: one of these": (
        "sparsity", "max_params", "max_macs", "max_bytes", "max_latency_ms", "speedup", "max_accuracy_drop", "max_drop",
    ),
    "What goes": ("criterion", "layerwise", "structure", "allocation", "round_to", "min_units", "uniform", "ignore"),
    "Repair": ("compensate", "refine", "refine_budget", "refine_tokens", "tokens"),
    "Training": ("finetune", "tune_tokens", "lora", "lr", "distill", "temperature", "record_every"),
    "Models larger than memory": ("offload", "activations"),
}  # fmt: skip


@verb(
    shared=True,
    after="import",
    headings=PANELS,
    examples={
        "Half of the weights of a language model": "prunekit compress my-model --data corpus.jsonl --sparsity 0.5 --out small",
        "The same with mask and weights learnt, on so many tokens": "prunekit compress my-model --data corpus.jsonl "
        "--sparsity 0.5 --tokens 600k --out small",
        "Channels, as many as may go for a point of accuracy": "prunekit compress my-model --data reviews.csv --text text "
        "--label label --structure channels --max-drop 1 --out small",
        "Heads and neurons, then three epochs of training": "prunekit compress my-model --data reviews.csv --text text "
        "--label label --structure heads+neurons --sparsity 0.3 --finetune 3 --out small",
        "The same of a language model in seconds: layers refitted": "prunekit compress my-model --data corpus.jsonl "
        "--ignore '*embed*' --ignore '*head*' -c kfac --structure heads+neurons -s 0.3 --compensate --out small",
        "As many heads in every layer, which a plain config can say": "prunekit compress my-model --data corpus.jsonl "
        "--structure heads --uniform --sparsity 0.3 --out small",
        "A model that does not fit into memory, a block at a time": "prunekit compress my-model --data corpus.jsonl "
        "--layerwise sparsegpt --sparsity 0.5 --offload --out small",
        "What it would do, take and leave whole": "prunekit compress my-model --data my_module:data --structure 2:4 "
        "--out small --dry-run",
        "Checkpoints in order, a path, so that influence counts too": "prunekit compress my-model/checkpoint-500 "
        "my-model/checkpoint-900 --data my_module:data --out small",
    },
)
def compress(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL_DIR...", help="Folder with config.json and safetensors; several are a path.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the smaller model; its run is DIR/prunekit.")],
    data: Data = None, data_args: DataArgs = "{}", text: Text = None, label: Label = None,
    length: Length = None, stride: Stride = None, skip_bad: SkipBad = False,
    task: Annotated[str | None, typer.Option(help="What it is for; the config's by default. JSON with options.")] = None,
    loss: Annotated[str | None, typer.Option(help="Import path of a loss; the task's own by default.")] = None,
    auto: Annotated[str | None, typer.Option(help="An AutoModelFor… of transformers, for the config's class.")] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Share to remove, in [0, 1); half of it unasked; not for N:M.")
    ] = None,
    max_params: Annotated[int | None, typer.Option(help="Parameters that may stay.")] = None,
    max_macs: Annotated[int | None, typer.Option(help="Theoretical MACs of one sample.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Size of model.safetensors.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Measured, at batch 64.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Times as fast as the dense model, measured beside it.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Points of validation accuracy to lose.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="What the task's first measure may lose, in its unit.")] = None,
    criterion: Annotated[
        list[str] | None, typer.Option("--criterion", "-c", help="As in score; magnitude, taylor, of a path influence.")
    ] = None,
    layerwise: Annotated[
        str | None, typer.Option(metavar="METHOD", help="By layers, new weights too: magnitude, wanda, sparsegpt, admm.")
    ] = None,
    structure: Annotated[str, typer.Option(help=f"{STRUCTURE_HELP}.")] = "unstructured",
    allocation: Annotated[str | None, typer.Option(help="As in prune; the best here.")] = None,
    round_to: Annotated[int | None, typer.Option(min=1, help="Channels, heads: what stays is a multiple of this.")] = None,
    min_units: Annotated[int | None, typer.Option(min=1, help="Channels, heads: the least that stays in a layer.")] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="As many units in every layer, as a plain config can say it.")
    ] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of parameters not to prune; repeatable.")] = None,
    compensate: Compensate = False,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Repair the plan by blame; tried unasked (docs/refine.md).")
    ] = None,
    refine_budget: Annotated[str | None, typer.Option(help="Refine for so long in all, such as 5m; 60s unasked.")] = None,
    refine_tokens: RefineTokens = None, tokens: TokensOption = None,
    finetune: Finetune = None, tune_tokens: TuneTokens = None, lora: Lora = None, lr: Rate = None, distill: Distill = None,
    temperature: Temperature = None, record_every: RecordEvery = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="With --layerwise: read and write a block at a time, never the model whole.")
    ] = False,
    activations: Annotated[
        str | None, typer.Option(metavar="2GiB", help="With --offload: hidden states in memory; more go to the disk.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, take and leave whole.")] = False,
    seed: Seed = None, device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Make a model in a Hugging Face folder smaller.

    It is import, score, compare, prune, eval, report and export in a row.
    """
    from prunekit.exporting.placing import RUN
    from prunekit.recipe import prune_section
    from prunekit.report.terminal.compressing import show_compressed, show_foreseen
    from prunekit.verbs.compress import check_out, compress_content, compress_folders
    from prunekit.verbs.foreseeing import foresee
    from prunekit.verbs.pretrained import folders_of, model_section

    options: dict[str, Any] = {
        "sparsity": sparsity, "max_params": max_params, "max_macs": max_macs, "max_bytes": max_bytes,
        "max_latency_ms": max_latency_ms, "speedup": speedup, "max_accuracy_drop": max_accuracy_drop, "max_drop": max_drop,
        "structure": structure, "allocation": allocation, "round_to": round_to, "min_units": min_units,
        "uniform": uniform or None, "layerwise": layerwise, "compensate": compensate or None,
        "refine": refine, "refine_budget": refine_budget,
        "refine_tokens": refine_tokens, "tokens": tokens, "finetune": finetune, "tune_tokens": tune_tokens, "lora": lora,
        "lr": lr, "distill": distill, "temperature": temperature, "record_every": record_every,
    }  # fmt: skip
    if layerwise is not None and criterion:
        raise UsageError("compress --layerwise takes the same share of every layer; leave --criterion out")
    if activations is not None and not offload:
        raise UsageError("--activations is how much --offload keeps of the hidden states in memory; give both")
    if offload and ranks.size() > 1:
        raise UsageError("--offload works in one process; start it without torchrun")
    if offload and dry_run:
        raise UsageError("--dry-run tries the model in memory, which --offload avoids; leave one of them out")
    if activations is not None and layerwise is not None:
        options["layerwise"] = {"method": layerwise, "activations": activations}
    wanted = prune_section(_halved(options))
    told = data_content(data, data_args, text=text, label=label, length=length, stride=stride, skip_bad=skip_bad)
    if told is None:
        raise UsageError("compress needs --data, to score and to choose by: a file, a folder, or my_module:data")
    folders = folders_of(models)
    content: dict[str, Any] = {
        "model": model_section(folders, auto),
        "data": told,
        **({} if task is None else {"task": json_object(task, "--task") if task.startswith("{") else task}),
        **({} if loss is None else {"loss": loss}),
        "prunable": {"ignore": ignore or []},
    }
    output = Output(quiet, as_json)
    named = criterion or []
    checked = recipe_of(compress_content(content, wanted, named), "compress", out, seed, device)
    if offload:
        from prunekit.report.terminal.compressing import show_offloaded
        from prunekit.verbs.offloading import check_offloaded, compress_offloaded

        check_offloaded(checked, models, folders, out)
        with output.working():
            result = compress_offloaded(checked, folders[0], out, overwrite, output.note)
        output.show(show_offloaded, result)
        output.finish(result)
        return
    check_out(checked, models, folders, out, named, overwrite)
    if dry_run:
        with output.working():
            foreseen = foresee(checked, folders, out, named)
        given = {
            "auto": auto, "data": data, "data_args": None if data_args == "{}" else data_args, "text": text, "label": label,
            "length": length, "stride": stride, "skip_bad": skip_bad or None, "task": task, "loss": loss, "ignore": ignore,
            "seed": seed, "device": device,
        }  # fmt: skip
        foreseen["commands"] = _commands(checked, folders, out, foreseen["criteria"], given, options)
        output.show(show_foreseen, foreseen)
        output.finish(foreseen)
        return
    with output.working(out / RUN):
        result = compress_folders(checked, folders, out, named, overwrite, output.note)
    output.show(show_compressed, result)
    output.finish(result)


def _halved(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with half of the weights to go where they do not say how much."""
    from prunekit.recipe.pruning import BUDGETS
    from prunekit.structure import check_structure, implied_sparsity

    check_structure(options["structure"])
    said = any(options[key] is not None for key in ("sparsity", *BUDGETS)) or implied_sparsity(options["structure"]) is not None
    return options if said else {**options, "sparsity": 0.5}


def _commands(
    recipe: Any, folders: list[Path], out: Path, criteria: list[str], given: dict[str, Any], options: dict[str, Any]
) -> dict[str, str]:
    """By verb the command that does the same alone."""
    from prunekit.exporting.placing import RUN

    (wanted,), compared, run = recipe.prune, recipe.compare, str(out / RUN)
    small = str(out / RUN / "pruned" / wanted.name)
    hf = [word for folder in folders for word in ("--hf", str(folder))]
    words = {
        "import": ["import", *hf, *_options(given), "--out", run],
        "score": ["score", run, *_options({"criterion": criteria})],
        "compare": ["compare", run, *_options({
            "structure": compared.structures, "allocation": compared.allocations, "sparsity": compared.sparsities
        })],
        "prune": ["prune", run, *_options(_halved(options)), "--name", wanted.name],
        "eval": ["eval", small],
        "report": ["report", run],
        "export": ["export", small, "--to", "hf", str(out)],
    }  # fmt: skip
    return {verb: shlex.join(["prunekit", *parts]) for verb, parts in words.items()}


def _options(values: dict[str, Any]) -> list[str]:
    """What is given as options are typed: lists repeat theirs, True is a flag, False its opposite."""
    found = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            found += [option] if one is True else [f"--no-{option[2:]}"] if one is False else [option, str(one)]
    return found
