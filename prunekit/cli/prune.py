"""prunekit prune: parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.opening import open_run
from prunekit.cli.options import STRUCTURE_HELP, Device, Json, Overwrite, Quiet, RunFolder, check_name, numbers, ratios
from prunekit.cli.output import Output
from prunekit.cli.verb import verb
from prunekit.errors import UsageError

PANELS = {
    "Limits of what goes": ("ratio", "floor", "round_to", "min_units", "classes"),
    "Budgets, instead of a sparsity": (
        "max_params", "max_macs", "max_bytes", "max_latency_ms", "max_accuracy_drop", "max_drop",
    ),
    "A plan as a file": ("dry_run", "apply"),
    "Repair": ("compensate", "refine", "refine_budget", "refine_again", "squeeze"),
    "In steps": ("schedule", "rounds", "every", "finetune", "lr", "distill", "temperature", "rewind", "recalibrate"),
}  # fmt: skip


@verb(
    after="compare",
    headings=PANELS,
    example="prunekit prune runs/digits-cnn --criterion auto --sparsity 0.8 --structure channels --name small",
)
def prune(
    run: RunFolder,
    criterion: Annotated[str, typer.Option("--criterion", "-c", help="As in score, or auto: the best here.")] = "auto",
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="Share to remove, in [0, 1); not for N:M.")] = None,
    structure: Annotated[str, typer.Option(help=f"{STRUCTURE_HELP}.")] = "unstructured",
    allocation: Annotated[str | None, typer.Option(help="global, uniform, mean, lamp, erk, proportional.")] = None,
    ratio: Annotated[list[str] | None, typer.Option(metavar="PATTERN=SHARE", help="Share to remove; last match counts.")] = None,
    floor: Annotated[float, typer.Option(help="Share of every layer that stays, in [0, 1).")] = 0.0,
    round_to: Annotated[int | None, typer.Option(min=1, help="Channels, heads: what stays is a multiple of this.")] = None,
    min_units: Annotated[int | None, typer.Option(min=1, help="Channels, heads: the least that stays in a layer.")] = None,
    max_params: Annotated[int | None, typer.Option(help="Parameters that may stay.")] = None,
    max_macs: Annotated[int | None, typer.Option(help="Theoretical MACs of one sample.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Size of model.safetensors.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Measured, at the last eval.latency_batches.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Points of validation accuracy to lose.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="What the task's first measure may lose, in its unit.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pruned model: RUN/pruned/NAME.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="3,5", help="Keep what serves these classes, judged on them.")] = None,
    compensate: Annotated[bool, typer.Option("--compensate", help="Let kept weights make up for removed ones.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print the plan only.")] = False,
    apply: Annotated[Path | None, typer.Option("--apply", help="Apply this plan file instead of making one.")] = None,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Repair the plan by blame; auto tries it (docs/refine.md).")
    ] = None,
    refine_budget: Annotated[str | None, typer.Option(help="Refine for so long in all, such as 60s; auto's try: 60s.")] = None,
    refine_again: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Refine and fine-tune N times more; implies --refine.")
    ] = None,
    squeeze: Annotated[bool, typer.Option("--squeeze", help="Take out channels that an unstructured mask emptied.")] = False,
    schedule: Annotated[str, typer.Option(help="one-shot, iterative, or gradual (while it fine-tunes).")] = "one-shot",
    rounds: Annotated[int | None, typer.Option(min=1, help="iterative, gradual: how many prunings.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="gradual: steps between two prunings.")] = None,
    finetune: Annotated[float | None, typer.Option(metavar="EPOCHS", help="Train on so long, in every round.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of fine-tuning; the dense training's by default.")] = None,
    distill: Annotated[float | None, typer.Option(metavar="WEIGHT", help="Of the dense model's soft labels.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the soft labels.")] = None,
    rewind: Annotated[int | None, typer.Option(min=0, metavar="STEP", help="Go back to this training step's weights.")] = None,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Measure BatchNorm statistics anew.")] = False,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Plan what goes, and write the pruned model."""
    from prunekit.recipe import Prune
    from prunekit.report.terminal.pruning import show_pruned
    from prunekit.structure import check_structure, implied_sparsity
    from prunekit.verbs.pruning import apply_plan, prune_run

    output = Output(quiet, as_json)
    if name is not None:
        check_name(name)
    budgets = {
        "max_params": max_params, "max_macs": max_macs, "max_bytes": max_bytes, "max_latency_ms": max_latency_ms,
        "max_accuracy_drop": max_accuracy_drop, "max_drop": max_drop,
    }  # fmt: skip
    how_much = {k: v for k, v in {"sparsity": sparsity, **budgets}.items() if v is not None}
    if apply is not None and (
        how_much or dry_run or refine or refine_budget or refine_again or allocation or compensate or classes or ratio or floor
        or round_to or min_units
        or criterion != "auto" or structure != "unstructured"
    ):  # fmt: skip
        raise UsageError("--apply takes a finished plan: leave out --dry-run and what makes one, such as --sparsity and --refine")
    if refine_again and refine is False:
        raise UsageError("--refine-again with --no-refine: leave one of them out")
    refine = True if refine_again else refine
    if refine_budget is not None and refine is None and criterion != "auto":
        raise UsageError("--refine-budget without --refine; unasked, only criterion auto tries to refine")
    if refine_budget is not None and refine is False:
        raise UsageError("--refine-budget with --no-refine: leave one of them out")
    repair: bool | dict[str, Any] | None = refine
    if refine_budget is not None or refine_again:
        repair = {"when": "always" if refine else "better", "budget": refine_budget, "again": refine_again or 0}
    steps = _steps(schedule, rounds, every, finetune, lr, distill, temperature, rewind, recalibrate)
    if apply is None:
        check_structure(structure)
        if not how_much and not implied_sparsity(structure):
            raise UsageError("prune needs --sparsity, a budget such as --max-params, or --apply PLAN")
        kind, value = next(iter(how_much.items()), ("sparsity", implied_sparsity(structure) or 0.0))
        label = f"{value:g}" if kind == "sparsity" else f"{kind.removeprefix('max_')}-{value:g}"
        wanted = Prune.of(
            {
                **steps.model_dump(mode="json"), **how_much, "name": name or f"{structure.replace(':', '-')}-{label}",
                "criterion": criterion, "structure": structure, "allocation": allocation, "ratios": ratios(ratio or []),
                "floor": floor, "round_to": round_to, "min_units": min_units,
                "compensate": compensate, "refine": repair, "squeeze": squeeze,
                "classes": numbers(classes, "--classes"),
            },
            "prune",
        )  # fmt: skip
    opened = open_run(run, device)
    with output.working(run):
        if apply is not None:
            result = apply_plan(opened, apply, name, overwrite, steps, squeeze)
        else:
            result = prune_run(opened, wanted, dry_run, overwrite)
    output.show(show_pruned, result)
    output.finish(result)


def _steps(
    schedule: str, rounds: int | None, every: int | None, epochs: float | None, lr: float | None,
    distill: float | None, temperature: float | None, rewind: int | None, recalibrate: bool,
) -> Any:  # fmt: skip
    """prune's options as the recipe's keys, checked as those are."""
    from prunekit.recipe import Steps

    training = epochs is not None or rewind is not None
    for option, value in (("--lr", lr), ("--distill", distill)):
        if value is not None and not training:
            raise UsageError(f"{option} is about fine-tuning; give --finetune EPOCHS or --rewind STEP")
    if temperature is not None and distill is None:
        raise UsageError("--temperature is about soft labels; give --distill WEIGHT")
    if rounds is not None and schedule not in ("iterative", "gradual"):
        raise UsageError("--rounds is about pruning in steps; give --schedule iterative or gradual")
    if every is not None and schedule != "gradual":
        raise UsageError("--every is about pruning while training; give --schedule gradual")

    def given(**options: Any) -> dict[str, Any]:
        return {k: v for k, v in options.items() if v is not None}

    soft = None if distill is None else given(weight=distill, temperature=temperature)
    asked: dict[str, Any] = {"schedule": given(name=schedule, rounds=rounds, every=every)}
    asked |= {"rewind": rewind, "recalibrate": recalibrate}
    if training:
        asked["finetune"] = given(epochs=epochs, lr=lr, distill=soft)
    return Steps.of(asked, "prune")
