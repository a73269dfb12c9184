"""prunekit prune: parses, calls, prints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.opening import open_run
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
    RunFolder,
    Temperature,
    TokensOption,
    TuneTokens,
    check_name,
    numbers,
    ratios,
)
from prunekit.cli.output import Output
from prunekit.cli.verb import verb

PANELS = {
    "How much goes: one of these": (
        "sparsity", "max_params", "max_macs", "max_bytes", "max_latency_ms", "speedup", "max_accuracy_drop", "max_drop",
    ),
    "What goes": (
        "criterion", "layerwise", "structure", "allocation", "ratio", "floor", "round_to", "min_units", "uniform", "classes",
        "apply",
    ),
    "Repair": ("compensate", "refine", "refine_budget", "refine_tokens", "refine_again", "tokens", "squeeze"),
    "Training": (
        "schedule", "rounds", "every", "finetune", "tune_tokens", "lora", "lr", "distill", "temperature", "rewind", "recalibrate",
        "record_every",
    ),
}  # fmt: skip


@verb(
    after="compare",
    shared=True,
    headings=PANELS,
    examples={
        "The best criterion here, 80 % of the weights in whole channels": "prunekit prune runs/digits-cnn --criterion auto "
        "--sparsity 0.8 --structure channels --name small",
        "A model three times as fast": "prunekit prune runs/digits-cnn --speedup 3 --structure channels --name fast",
        "The smallest that loses a point at most": "prunekit prune runs/digits-cnn --max-accuracy-drop 1 --name point",
        "A mask, repaired by the blame of what it removed": "prunekit prune runs/digits-cnn -c magnitude -s 0.9 --refine "
        "--name better",
        "A language model: its mask learnt, then its weights": "prunekit prune runs/stdlib-llama -c magnitude -s 0.7 "
        "--refine-tokens 600k --tune-tokens 300k --name learnt",
        "A language model by layers, then its weights": "prunekit prune runs/stdlib-llama --layerwise admm -s 0.5 "
        "--tune-tokens 300k --name by-layers",
        "In rounds, with training between them": "prunekit prune runs/digits-cnn -c magnitude -s 0.9 --schedule iterative "
        "--rounds 5 --finetune 5 --name rounds",
        "A plan to look at and edit, then to apply": "prunekit prune runs/digits-cnn -c magnitude -s 0.5 --dry-run --name plan",
        "That plan": "prunekit prune runs/digits-cnn --apply runs/digits-cnn/pruned/plan/plan.safetensors",
    },
)
def prune(
    run: RunFolder,
    criterion: Annotated[
        str, typer.Option("--criterion", "-c", help="As in score, or auto: the best here (with --layerwise: equal shares).")
    ] = "auto",
    layerwise: Annotated[
        str | None, typer.Option(metavar="METHOD", help="By layers, new weights too: magnitude, wanda, sparsegpt, admm.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="Share to remove, in [0, 1); not for N:M.")] = None,
    structure: Annotated[str, typer.Option(help=f"{STRUCTURE_HELP}.")] = "unstructured",
    allocation: Annotated[str | None, typer.Option(help="global, uniform, rows, mean, standardised, lamp, erk …")] = None,
    ratio: Annotated[list[str] | None, typer.Option(metavar="PATTERN=SHARE", help="Share to remove; last match counts.")] = None,
    floor: Annotated[float, typer.Option(help="Share of every layer that stays, in [0, 1).")] = 0.0,
    round_to: Annotated[int | None, typer.Option(min=1, help="Channels, heads: what stays is a multiple of this.")] = None,
    min_units: Annotated[int | None, typer.Option(min=1, help="Channels, heads: the least that stays in a layer.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="As many units in every layer of a stack of blocks.")] = False,
    max_params: Annotated[int | None, typer.Option(help="Parameters that may stay.")] = None,
    max_macs: Annotated[int | None, typer.Option(help="Theoretical MACs of one sample.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Size of model.safetensors.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Measured, at the last eval.latency_batches.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Times as fast as the dense model, measured beside it.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Points of validation accuracy to lose.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="What the task's first measure may lose, in its unit.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pruned model: RUN/pruned/NAME.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="3,5", help="Keep what serves these classes, judged on them.")] = None,
    compensate: Compensate = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print the plan only.")] = False,
    apply: Annotated[Path | None, typer.Option("--apply", help="Apply this plan file instead of making one.")] = None,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Repair the plan by blame; auto tries it (docs/refine.md).")
    ] = None,
    refine_budget: Annotated[str | None, typer.Option(help="Refine for so long in all, such as 60s; auto's try: 60s.")] = None,
    refine_tokens: RefineTokens = None,
    tokens: TokensOption = None,
    refine_again: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Refine and fine-tune N times more; implies --refine.")
    ] = None,
    squeeze: Annotated[bool, typer.Option("--squeeze", help="Take out channels that an unstructured mask emptied.")] = False,
    schedule: Annotated[str, typer.Option(help="one-shot, iterative, or gradual (while it fine-tunes).")] = "one-shot",
    rounds: Annotated[int | None, typer.Option(min=1, help="iterative, gradual: how many prunings.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="gradual: steps between two prunings.")] = None,
    finetune: Finetune = None, tune_tokens: TuneTokens = None, lora: Lora = None, lr: Rate = None, distill: Distill = None,
    temperature: Temperature = None, record_every: RecordEvery = None,
    rewind: Annotated[int | None, typer.Option(min=0, metavar="STEP", help="Go back to this training step's weights.")] = None,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Measure BatchNorm statistics anew.")] = False,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Plan what goes, and write the pruned model."""
    from prunekit.recipe import applied_steps, prune_section
    from prunekit.report.terminal.pruning import show_pruned
    from prunekit.verbs.pruning import apply_plan, prune_run

    output = Output(quiet, as_json)
    if name is not None:
        check_name(name)
    options = {
        "criterion": criterion, "layerwise": layerwise, "sparsity": sparsity, "structure": structure, "allocation": allocation,
        "name": name,
        "ratio": ratios(ratio or []), "floor": floor, "round_to": round_to, "min_units": min_units, "uniform": uniform,
        "max_params": max_params, "max_macs": max_macs, "max_bytes": max_bytes, "max_latency_ms": max_latency_ms,
        "speedup": speedup, "max_accuracy_drop": max_accuracy_drop, "max_drop": max_drop,
        "classes": numbers(classes, "--classes"), "compensate": compensate, "dry_run": dry_run,
        "refine": refine, "refine_budget": refine_budget, "refine_tokens": refine_tokens, "tokens": tokens,
        "refine_again": refine_again, "squeeze": squeeze,
        "schedule": schedule, "rounds": rounds, "every": every, "finetune": finetune, "tune_tokens": tune_tokens, "lora": lora,
        "lr": lr, "distill": distill, "temperature": temperature, "record_every": record_every,
        "rewind": rewind, "recalibrate": recalibrate,
    }  # fmt: skip
    if apply is None:
        work = partial(prune_run, wanted=prune_section(options), dry_run=dry_run, overwrite=overwrite)
    else:
        steps = applied_steps(options)
        work = partial(apply_plan, plan_path=apply, name=name, overwrite=overwrite, steps=steps, squeezing=squeeze)
    opened = open_run(run, device)
    with output.working(run):
        result = work(opened)
    if quiet and (result["refine"] or {}).get("ended") == "interrupted":
        typer.echo("prune: interrupted: what is written is the best so far", err=True)
    output.show(show_pruned, result)
    output.finish(result)
