"""The command line: one short function a verb, which parses, calls and prints."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.errors import PrunekitError, UsageError
from prunekit.progress import progress_bars
from prunekit.version import __version__

app = typer.Typer(
    name="prunekit",
    help="Make a trained model smaller, and see why each weight stayed or went.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that train or import made.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace artifacts that were made from other inputs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no tables.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; the recipe's by default.")]
STRUCTURE_HELP = "unstructured, channels, heads, layers, N:M (2:4), block:ROWSxCOLUMNS (block:4x1)"
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Overrides the recipe's seed.")]


_CRITERION = (
    "Name of a criterion, or all; repeatable. With options: 'influence(target=margin,aggregation=l2)'; composed: "
    "'influence^0.25*magnitude^0.75', 'rank(influence)+rank(magnitude)', 'tempered(influence)'."
)


class _Out:
    """Where a verb's result goes: tables for people, JSON for programs, nothing when quiet.

    While a verb works, whatever the user's own code prints goes to stderr (nowhere when quiet), so that stdout holds
    the result alone.
    """

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json, self.stdout = quiet, as_json, sys.stdout

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def show(self, verb: str, result: Any) -> None:
        if not self.quiet and not self.as_json:
            from prunekit.report import terminal

            with redirect_stdout(self.stdout):
                terminal.SHOW[verb](result)

    def finish(self, result: Any) -> None:
        if self.as_json:
            print(json.dumps(result, indent=2), file=self.stdout)

    @contextmanager
    def working(self, run: Path | None = None) -> Iterator[None]:
        """Progress bars on; ``run`` is written by nobody else meanwhile."""
        from prunekit.checkpoint import locked

        with ExitStack() as stack:
            if run is not None:
                stack.enter_context(locked(run))
            elsewhere = stack.enter_context(open(os.devnull, "w")) if self.quiet else sys.stderr
            stack.enter_context(redirect_stdout(elsewhere))
            stack.enter_context(progress_bars(not self.quiet))
            yield


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"prunekit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command(epilog="Example: prunekit train recipes/digits-cnn.yaml --out runs/digits-cnn")
def train(
    recipe: RecipeFile, out: Out, seed: Seed = None, device: Device = None, overwrite: Overwrite = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Train the recipe's model and record every step."""
    from prunekit.verbs.training import train_run

    output = _Out(quiet, as_json)
    checked = _recipe(recipe, out, seed, device)
    with output.working(out):
        result = train_run(checked, out, overwrite, output.note)
    output.show("train", result)
    output.finish(result)


@app.command("import", epilog="Example: prunekit import --model my_module:build --weights model.safetensors --out RUN")
def import_(
    model: Annotated[str, typer.Option(help="Import path of the model factory, module:function.")],
    weights: Annotated[list[Path], typer.Option(help="Checkpoint (safetensors, shards, .pt); repeat it, in order, for a path.")],
    out: Out,
    model_args: Annotated[str, typer.Option(metavar="JSON", help="The factory's keyword arguments.")] = "{}",
    data: Annotated[str | None, typer.Option(help="Import path of a data factory, module:function.")] = None,
    data_args: Annotated[str, typer.Option(metavar="JSON", help="The data factory's keyword arguments.")] = "{}",
    task: Annotated[str | None, typer.Option(help="What it is for: causal_lm, … or module:task; JSON with options.")] = None,
    loss: Annotated[str | None, typer.Option(help="Import path of a loss; the task's own by default.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of parameters not to prune; repeatable.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of parameters to prune that are no layer's weights.")] = None,
    attention: Annotated[
        list[str] | None, typer.Option(metavar="JSON", help="Layers of an attention: q, k, v (or qkv), o, heads; repeatable.")
    ] = None,
    seed: Seed = None, device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Bring in a model that was trained elsewhere."""
    from prunekit.verbs.training import import_run

    content: dict[str, Any] = {
        "model": {"factory": model, "args": _json_object(model_args, "--model-args")},
        **({} if task is None else {"task": _json_object(task, "--task") if task.startswith("{") else task}),
        **({} if loss is None else {"loss": loss}),
        "prunable": {"ignore": ignore or [], "include": include or []},
        "structure": {"attention": [_json_object(one, "--attention") for one in attention or []]},
    }
    if data is not None:
        content["data"] = {"factory": data, "args": _json_object(data_args, "--data-args")}
    output = _Out(quiet, as_json)
    checked = _checked(content, "import", out, seed, device)
    if data is None and data_args != "{}":
        raise UsageError("--data-args without --data")
    with output.working(out):
        result = import_run(checked, weights, out, overwrite, output.note)
    output.show("import", result)
    output.finish(result)


@app.command(epilog="Example: prunekit score runs/digits-cnn --criterion influence --criterion magnitude")
def score(
    run: RunFolder,
    criterion: Annotated[list[str], typer.Option("--criterion", "-c", help=_CRITERION)],
    quadrature: Annotated[str | None, typer.Option(help="influence: ranking or reconstruction.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="influence: nodes a piece, for ranking.")] = None,
    early: Annotated[tuple[int, int] | None, typer.Option(metavar="STEPS NODES", help="influence: nodes in early steps.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="influence: allowed error, for reconstruction.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="influence: kept states a piece.")] = None,
    share: Annotated[str | None, typer.Option(help="influence: kernel, regularisation, whole or survival.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="influence: l1, l2, square or mean (signed), over samples.")] = None,
    memory: Annotated[str | None, typer.Option(help="influence: for scores in work, such as 512MiB.")] = None,
    max_error: Annotated[float | None, typer.Option(help="influence: write nothing if the estimated error is larger.")] = None,
    target: Annotated[str | None, typer.Option(help="influence: outputs, log_prob, margin, loss, or module:function.")] = None,
    skip_unfit: Annotated[bool, typer.Option("--skip-unfit", help="wanda, obs: by magnitude what they cannot score.")] = False,
    seed: Seed = None, device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Score every prunable weight by one or more criteria."""
    from dataclasses import replace

    from prunekit.imports import load_object
    from prunekit.verbs.scoring import score_run

    output = _Out(quiet, as_json)
    opened = _open(run, device)
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
        evidence = replace(opened.evidence, **options)
        result = score_run(opened, criterion, overwrite, evidence, max_error)
    output.show("score", result)
    output.finish(result)


@app.command(
    epilog="Example: prunekit compare runs/digits-cnn; over cases and seeds: prunekit compare recipes/comparison.yaml --out DIR"
)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN… | STUDY", help="A run; with --out several, or a study.")],
    structure: Annotated[list[str] | None, typer.Option(help=f"{STRUCTURE_HELP}; repeatable.")] = None,
    allocation: Annotated[list[str] | None, typer.Option(help="global, uniform, …; repeatable.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share to remove; repeatable.")] = None,
    refine: Annotated[bool | None, typer.Option("--refine/--no-refine", help="Repair the best plans too.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of a comparison over runs or of a study.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes, with --out.")] = 1,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare every scored criterion on validation data; with --out, over runs or a study's cases and seeds, on test data."""
    from prunekit.plan import check_sparsity, check_structure
    from prunekit.plan.allocation import get_allocation
    from prunekit.verbs.scoring import compare_run

    output = _Out(quiet, as_json)
    for name in structure or []:
        check_structure(name)
    for name in allocation or []:
        get_allocation(name)
    for share in sparsity or []:
        check_sparsity(share)
    if out is not None:
        if structure or allocation or sparsity or refine is not None or device or overwrite:
            raise UsageError("--out takes structures, allocations, sparsities and refine from the study or the runs' recipes")
        _study(runs, out, jobs, output)
        return
    if len(runs) > 1 or runs[0].suffix in (".yaml", ".yml"):
        raise UsageError("several runs, or a study, need --out DIR")
    if jobs != 1:
        raise UsageError("--jobs is for a comparison over runs or a study; give --out DIR")
    run = runs[0]
    opened = _open(run, device)
    with output.working(run):
        result = compare_run(opened, overwrite, structure or [], allocation or [], sparsity or [], refine)
    output.show("compare", result)
    comparison, reused = result
    cells = {"dense": comparison.dense, "cells": comparison.cells, "cost": comparison.cost}
    output.finish({"path": str(run / "compare.json"), **cells, "reused": reused})


def _study(paths: list[Path], out: Path, jobs: int, output: _Out) -> None:
    from prunekit.imports import use_working_folder
    from prunekit.verbs.comparing import jobs_of_runs, jobs_of_study, study_run

    use_working_folder(out)
    if (out / "recipe.yaml").exists():
        raise UsageError(f"--out is {out}, a run folder, whose own comparison would be replaced; give a folder of its own")
    if len(paths) == 1 and paths[0].suffix in (".yaml", ".yml"):
        study, work = jobs_of_study(paths[0], out)
    else:
        study, work = jobs_of_runs(paths, out)
    with output.working(out):
        result = {**study_run(study, work, out, jobs), "path": str(out / "report.html")}
    output.show("study", result)
    output.finish(result)


@app.command(epilog="Example: prunekit prune runs/digits-cnn --criterion auto --sparsity 0.8 --structure channels --name small")
def prune(
    run: RunFolder,
    criterion: Annotated[str, typer.Option("--criterion", "-c", help="As in score, or auto: the best here.")] = "auto",
    sparsity: Annotated[float | None, typer.Option("--sparsity", "-s", help="Share to remove, in [0, 1); not for N:M.")] = None,
    structure: Annotated[str, typer.Option(help=f"{STRUCTURE_HELP}.")] = "unstructured",
    allocation: Annotated[str | None, typer.Option(help="global, uniform, mean, lamp, erk, proportional.")] = None,
    ratio: Annotated[list[str] | None, typer.Option(metavar="PATTERN=SHARE", help="Share to remove; last match counts.")] = None,
    floor: Annotated[float, typer.Option(help="Share of every layer that stays, in [0, 1).")] = 0.0,
    round_to: Annotated[int | None, typer.Option(min=1, help="Channels, heads: what stays is a multiple of this.")] = None,
    min_units: Annotated[int | None, typer.Option(min=1, help="Channels, heads: so many stay in a layer at least.")] = None,
    max_params: Annotated[int | None, typer.Option(help="Instead of a sparsity: parameters that may stay.")] = None,
    max_macs: Annotated[int | None, typer.Option(help="Instead: theoretical MACs of one sample.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Instead: size of model.safetensors.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Instead: measured, at the last eval.latency_batches.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Instead: points of validation accuracy to lose.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Instead: what the task's first measure may lose, in its unit.")] = None,
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
        int | None, typer.Option(min=0, metavar="N", help="Refine and fine-tune so many times more; implies --refine.")
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
    from prunekit.structure import check_structure, implied_sparsity
    from prunekit.verbs.pruning import apply_plan, prune_run

    output = _Out(quiet, as_json)
    if name is not None:
        _check_name(name)
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
                "criterion": criterion, "structure": structure, "allocation": allocation, "ratios": _ratios(ratio or []),
                "floor": floor, "round_to": round_to, "min_units": min_units,
                "compensate": compensate, "refine": repair, "squeeze": squeeze,
                "classes": _numbers(classes, "--classes"),
            },
            "prune",
        )  # fmt: skip
    opened = _open(run, device)
    with output.working(run):
        if apply is not None:
            result = apply_plan(opened, apply, name, overwrite, steps, squeeze)
        else:
            result = prune_run(opened, wanted, dry_run, overwrite)
    output.show("prune", result)
    output.finish(result)


@app.command("eval", epilog="Example: prunekit eval runs/digits-cnn/pruned/small")
def eval_(
    pruned: Annotated[Path, typer.Argument(metavar="RUN/pruned/NAME", help="Folder of a pruned model.")],
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a pruned model on test data, and rebuild it from the training path."""
    from prunekit.verbs.evaluating import evaluate, run_of

    output = _Out(quiet, as_json)
    opened = _open(run_of(pruned), device)
    with output.working(opened.path):
        result = evaluate(opened, pruned, overwrite)
    output.show("eval", (pruned.resolve().name, result))
    output.finish(result)


@app.command(epilog="Example: prunekit sensitivity runs/digits-cnn --criterion magnitude")
def sensitivity(
    run: RunFolder,
    criterion: Annotated[str, typer.Option("--criterion", "-c", help="Decides what goes inside a layer.")] = "magnitude",
    structure: Annotated[str, typer.Option(help="unstructured, channels, …")] = "unstructured",
    sparsity: Annotated[list[float] | None, typer.Option(help="Share to remove of a layer; repeatable.")] = None,
    device: Device = None, overwrite: Overwrite = False, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Prune one layer at a time: the first measure by layer and sparsity, on validation data."""
    from prunekit.verbs.sensitivity import sensitivity_run

    output = _Out(quiet, as_json)
    opened = _open(run, device)
    with output.working(run):
        result = sensitivity_run(opened, structure, criterion, sparsity or [], overwrite)
    output.show("sensitivity", result)
    output.finish(result)


@app.command(
    epilog="Example: prunekit explain runs/digits-cnn channel conv2 7; prunekit explain runs/digits-cnn diff channels; "
    "prunekit explain runs/digits-cnn/pruned/unstructured"
)
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN | RUN/pruned/NAME", help="A run, or a pruned model and nothing more.")],
    what: Annotated[str, typer.Argument(metavar="WHAT", help="weight, channel, head, layer, sample, pruned or diff.")] = "",
    name: Annotated[str, typer.Argument(metavar="NAME", help="A parameter, group or layer; a sample; a pruned model.")] = "",
    index: Annotated[str, typer.Argument(metavar="[INDEX]", help="Of a weight, channel or head; diff: another model.")] = "",
    split: Annotated[str | None, typer.Option(help="test, validation, scoring; train for a training sample.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many; eval.samples by default.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Of a training step; pruned, diff: of the pruning.")] = None,
    pruned: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Look at this pruned model only; repeatable.")] = None,
    device: Device = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say what a part or sample gave, when, from what data, and what pruning changed; writes a page under RUN/explain."""
    from prunekit.verbs.evaluating import run_of
    from prunekit.verbs.explaining import explain_run

    output = _Out(quiet, as_json)
    if not what and run.resolve().parent.name == "pruned":
        run, what, name = run_of(run), "pruned", run.resolve().name
    if not name:
        raise UsageError(f"explain {run} {what}".rstrip() + ": of what? Give WHAT and NAME, or RUN/pruned/NAME alone")
    opened = _open(run, device)
    with output.working(run):
        result = explain_run(opened, what, name, index, split=split, samples=samples, nodes=nodes, only=pruned)
    output.show("explain", result)
    output.finish(result)


@app.command(epilog="Example: prunekit report runs/digits-cnn")
def report(run: RunFolder, quiet: Quiet = False, as_json: Json = False) -> None:
    """Write RUN/report.html from what the run holds by now."""
    from prunekit.verbs.reporting import report_run

    output = _Out(quiet, as_json)
    opened = _open(run, None)
    with output.working(run):
        page, left_out = report_run(opened)
    output.show("report", (page, left_out))
    output.finish({"path": str(page), "left_out": left_out})


@app.command(epilog="Example: prunekit run recipes/digits-cnn.yaml --out runs/digits-cnn")
def run(
    recipe: RecipeFile, out: Out, seed: Seed = None, device: Device = None, overwrite: Overwrite = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Do all of it: train, score, compare, prune, eval, report."""
    from prunekit.verbs.reporting import run_recipe

    output = _Out(quiet, as_json)
    checked = _recipe(recipe, out, seed, device)
    with output.working(out):
        result = run_recipe(checked, out, overwrite, output.show, output.note)
    output.finish(result)


@app.command(epilog="Example: prunekit info runs/digits-cnn/scores/influence.safetensors")
def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Any artifact, run folder or recipe.")], as_json: Json = False
) -> None:
    """Say what an artifact is, what it was made from, and what it cost."""
    from prunekit.verbs.info import info as describe

    result = describe(path)
    output = _Out(False, as_json)
    output.show("info", result)
    output.finish(result)


def main() -> None:
    """Entry point: exit code 0, 1 (failed), 2 (wrong use), 130 (interrupted); one line on stderr for an error."""
    debug = bool(os.environ.get("PRUNEKIT_DEBUG"))
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries underneath; what a user must know is said in our own words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    try:
        if "" in sys.argv[1:]:
            raise UsageError("an argument is empty")
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        _fail(error.format_message() + _given(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, PrunekitError):
            _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        _fail(f"{type(error).__name__}: {error} (at {where}; PRUNEKIT_DEBUG=1 shows the whole traceback)", 1)
    if code == 130:  # the parser turns Ctrl-C into a code and says nothing
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"prunekit: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # stdout itself is what failed: the interpreter must not try again while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _given(error: typer.TyperException) -> str:
    """The value that an option was given, which the parser's message leaves out."""
    options = getattr(getattr(error, "param", None), "opts", ())
    for option, value in zip(sys.argv, sys.argv[1:], strict=False):
        if option in options:
            return f" (given: {value})"
    return ""


def _open(path: Path, device: str | None) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.verbs.run_folder import Run

    use_working_folder(path)
    return Run(path, device)


def _recipe(path: Path, out: Path, seed: int | None, device: str | None) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.recipe import Recipe

    use_working_folder(out)
    return _overridden(Recipe.load(path), seed, device)


def _checked(content: dict[str, Any], source: str, out: Path, seed: int | None, device: str | None) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.recipe import Recipe

    use_working_folder(out)
    return _overridden(Recipe.of(content, source), seed, device)


def _overridden(recipe: Any, seed: int | None, device: str | None) -> Any:
    changes = {k: v for k, v in {"seed": seed, "device": device}.items() if v is not None}
    return type(recipe).of({**recipe.model_dump(mode="json"), **changes}, "command line") if changes else recipe


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


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} is {text[:60]!r}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{option} is {text!r}; it must be a JSON object such as '{{\"width\": 32}}'")
    return found


def _numbers(text: str | None, option: str) -> list[int]:
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} is {text!r}; write whole numbers, such as 3,5")
    return [int(part) for part in parts]


def _ratios(given: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        pattern, _, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--ratio is {text!r}; write PATTERN=SHARE, for example 'conv1*=0.3'") from None
        if pattern in found:
            raise UsageError(f"--ratio: {pattern!r} is given twice")
        found[pattern] = value
    return found


def _check_name(name: str) -> None:
    import re

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(
            f"--name is {name!r}; use letters, digits, '.', '_' and '-', beginning with a letter or digit, 100 at most"
        )
