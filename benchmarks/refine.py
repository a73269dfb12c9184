"""What repairing a mask gains: one-shot unstructured masks of the same size, test accuracy, no weight updated.

Magnitude, tempered per-sample Taylor, both refined ones, and the rivals of prunekit.search.rivals, all from the same
scoring samples (500 of the training split by default; a quarter of them only accepts). The classifier is pruned too. What a
method costs is counted in passes: evaluations over the number of samples to learn from, with a gradient and without.

    OMP_NUM_THREADS=1 python benchmarks/refine.py [--seeds 0 1] [--samples 500] [--methods magnitude refine] [--seconds 600]
    OMP_NUM_THREADS=1 python benchmarks/refine.py --ablation --seeds 0 1 2

--ablation takes refine apart instead: its stages alone, what ranks, nodes, where each starts, scoring samples.
Every finished cell is a line of --out, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.outputs import predict
from prunekit import Plan, Recorder, Scores, Trajectory, make_plan, masked, refine, score
from prunekit.criteria import model_digest
from prunekit.data import digits
from prunekit.measure import accuracy, kl, machine
from prunekit.recipe import Recipe
from prunekit.repair.objective import make_objective
from prunekit.repair.swaps import Weights
from prunekit.search.rivals import RIVALS
from prunekit.search.rivals.evaluations import counted
from prunekit.task import Classification
from prunekit.training import TrainOptions, train
from prunekit.trajectory import Layout

RECIPE = Path(__file__).parent.parent / "recipes" / "digits-cnn.yaml"
SPARSITIES = (0.7, 0.8, 0.9, 0.95, 0.97)
PATH_SAMPLES = 64  # that influence explains, all outputs of each


def mlp() -> nn.Module:
    """64-256-128-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


@dataclass(frozen=True)
class Case:
    """A model of the recipe (or the MLP in its place), trained as the recipe says, and the data's splits."""

    which: str
    seed: int

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        return digits(self.seed, **Recipe.load(RECIPE).data.args)  # type: ignore[union-attr]

    @cached_property
    def model(self) -> nn.Module:
        return self._trained(None)

    @cached_property
    def influence(self) -> dict[str, Tensor]:
        """The criterion of that name, every step of a recorded path, on ``PATH_SAMPLES`` samples."""
        x, y = self.data["train"]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "path"
            model = self._trained(folder)
            assert model_digest(model) == model_digest(self.model)
            return score(Trajectory(folder), model, [(x[:PATH_SAMPLES], y[:PATH_SAMPLES])], "influence").importance

    def _trained(self, folder: Path | None) -> nn.Module:
        recipe = Recipe.load(RECIPE)
        options = recipe.train
        torch.manual_seed(self.seed)
        recipe = Recipe.of({**recipe.model_dump(mode="json"), "seed": self.seed}, RECIPE)
        model = recipe.build_model() if self.which == "cnn" else mlp()
        x, y = self.data["train"]
        optimizer, scheduler = recipe.build_optimizer(model, options.epochs * -(-len(x) // options.batch_size))
        recorder = Recorder(folder, model, optimizer, scheduler=scheduler) if folder else None
        with recorder or contextlib.nullcontext():
            train(
                model, optimizer, scheduler, TrainOptions(
                    lambda i: (x[i], y[i]), len(x), epochs=options.epochs, batch_size=options.batch_size, seed=self.seed
                ),
                recorder=recorder,
            )  # fmt: skip
        return model.eval()


Batches = list[tuple[Tensor, Tensor]]
Start = Callable[[Case, Batches, float], Plan]


def plan_of(model: nn.Module, importance: dict[str, Tensor], sparsity: float) -> Plan:
    facts = {
        "criterion": "benchmark", "group": "l2", "aggregation": None, "trajectory": "none", "model": model_digest(model),
        "prunable": list(importance),
    }  # fmt: skip
    return make_plan(Scores(importance, {}, facts), model, sparsity=sparsity)


def magnitude(case: Case, batches: Batches, sparsity: float) -> Plan:
    return plan_of(case.model, {n: p.detach().abs() for n, p in case.model.named_parameters() if p.dim() > 1}, sparsity)


def influence(case: Case, batches: Batches, sparsity: float) -> Plan:
    return plan_of(case.model, case.influence, sparsity)


def rival(name: str, case: Case, batches: Batches, sparsity: float) -> Plan:
    pattern = Weights(magnitude(case, batches, sparsity), Layout.of(case.model), torch.device("cpu"))
    objective = make_objective(case.model, batches, "kl", "margin", task=Classification(), seed=case.seed)
    return pattern.plan(RIVALS[name](pattern, objective, case.seed))


def repaired(case: Case, batches: Batches, sparsity: float, start: Start = magnitude, **options: object) -> Plan:
    """All rounds, so that every variant takes as many gradients."""
    return refine(start(case, batches, sparsity), case.model, batches, seed=case.seed, patience=None, **options)  # type: ignore[arg-type]


def swapped(by: str, case: Case, batches: Batches, sparsity: float) -> Plan:
    """The swaps with one ranking in all rounds, or with removed weights given back at random."""
    room = importlib.import_module("prunekit.repair.refine")
    generator = torch.Generator().manual_seed(case.seed)
    drawn = (lambda best: torch.rand(len(best.keep), generator=generator)) if by == "random" else room._gain
    with patch.object(room, "_ranking", lambda number: "blame" if by == "blame" else "gain"), patch.object(room, "_gain", drawn):
        return repaired(case, batches, sparsity, learn=False)


def learnt_at_the_end(case: Case, batches: Batches, sparsity: float) -> Plan:
    """Learnt with gradients of the pruned model alone, never on the way to it."""
    room = importlib.import_module("prunekit.repair.refine")
    with patch.object(room, "learnt_masks", partial(room.learnt_masks, begin=1.0)):
        return repaired(case, batches, sparsity, rounds=0)


METHODS: dict[str, Callable[[Case, Batches, float], Plan]] = {
    "magnitude": magnitude,
    **{name: partial(rival, name) for name in RIVALS},
    "learn": partial(repaired, rounds=0),
    "refine": partial(repaired, learn=False),
    "refine+learn": repaired,
}
PARTS: dict[str, Callable[[Case, Batches, float], Plan]] = {
    "learn at the end": learnt_at_the_end,
    "learn from magnitude": partial(repaired, rounds=0, temper=0.0),
    "random swaps": partial(swapped, "random"),
    "blame only": partial(swapped, "blame"),
    "gain only": partial(swapped, "gain"),
    **{f"nodes {nodes}": partial(repaired, learn=False, nodes=nodes) for nodes in (1, 2)},
    "start tempered": partial(repaired, learn=False, start=partial(rival, "tempered")),
    "start influence": partial(repaired, learn=False, start=influence),
    **{f"refine, {share:g}": partial(repaired, learn=False, share=share) for share in (0.06, 0.15, 0.25)},
}
"""Learning, or swaps (``learn=False``), with one thing changed.

Swaps: blame and gain in turn, 8 nodes, from magnitude, and 0.1 of the kept weights swapped at first.
"""
ABLATION: dict[str, tuple[str, int]] = {
    "**learn, then swap**, 500 samples": ("refine+learn", 500),
    "learn, then swap, 128 samples": ("refine+learn", 128),
    "learn, then swap, 32 samples": ("refine+learn", 32),
    "**learn** alone: along the path, from tempered importances": ("learn", 500),
    "learn alone, gradients of the pruned model (t = 1)": ("learn at the end", 500),
    "learn alone, from magnitude": ("learn from magnitude", 500),
    "learn alone, from magnitude, t = 1 (edge-popup)": ("edge-popup", 500),
    "**swap** alone: blame and gain in turn, 8 nodes, from magnitude": ("refine", 500),
    "swap alone, blame only": ("blame only", 500),
    "swap alone, gain only": ("gain only", 500),
    "swap alone, random weights come back": ("random swaps", 500),
    "swap alone, 2 nodes": ("nodes 2", 500),
    "swap alone, 1 node": ("nodes 1", 500),
    "swap alone, from tempered Taylor": ("start tempered", 500),
    "swap alone, from influence": ("start influence", 500),
    "swap alone, 128 samples": ("refine", 128),
    "swap alone, 32 samples": ("refine", 32),
    "no swap: magnitude": ("magnitude", 500),
    "no swap: tempered Taylor": ("tempered", 500),
    "no swap: influence": ("influence", 500),
}
EVERY = {**METHODS, **PARTS, "influence": influence}
Cell = tuple[str, int, int, float, str, str]
Rows = dict[Cell, dict[str, float]]


def measure(case: Case, cell: Cell, split: str) -> dict[str, object]:
    _, _, samples, sparsity, method, _ = cell
    x, y = case.data["train"]
    batches, test = [(x[:samples], y[:samples])], [case.data[split]]
    dense, labels = predict(case.model, test)
    if "influence" in method:
        _ = case.influence  # scored once a model, before the clock starts
    started = time.perf_counter()
    with counted(case.model) as evaluations:
        plan = EVERY[method](case, batches, sparsity)
    seconds = time.perf_counter() - started
    outputs, _ = predict(masked(case.model, plan), test)
    learn = samples - round(samples / 4)
    return {
        "cell": list(cell), "accuracy": accuracy(outputs, labels), "kl": kl(outputs, dense),
        "dense": accuracy(dense, labels), "seconds": seconds, "sparsity": plan.sparsity()["prunable"],
        "gradients": evaluations.gradients / learn, "forwards": evaluations.forwards / learn,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["mlp", "cnn"], default=["mlp", "cnn"])
    parser.add_argument("--methods", nargs="+", choices=list(EVERY), default=list(METHODS))
    parser.add_argument("--ablation", action="store_true", help="instead of methods: refine with one thing changed, a table")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="what accuracy is measured on")
    parser.add_argument("--samples", type=int, default=500, help="for scoring; the ablation has its own")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this long; call again to go on")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-refine.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    cells: Rows = {tuple(row["cell"]): row for row in map(json.loads, lines) if "gradients" in row}
    deadline = time.monotonic() + options.seconds
    pairs = list(ABLATION.values()) if options.ablation else [(method, options.samples) for method in options.methods]
    for which in options.models:
        for seed in options.seeds:
            case = Case(which, seed)
            for sparsity in options.sparsities:
                for method, samples in pairs:
                    cell = (which, seed, samples, sparsity, method, options.split)
                    if cell in cells or time.monotonic() > deadline:
                        continue
                    row = measure(case, cell, options.split)
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    cells[cell] = row  # type: ignore[assignment]
    (report_ablation if options.ablation else report)(cells, options)


def report_ablation(cells: Rows, options: argparse.Namespace) -> None:
    """Mean accuracy over the sparsities: mean and sample standard deviation over seeds, in points."""
    print(f"{machine()}; seeds {options.seeds}, {options.split} accuracy, mean over sparsities {options.sparsities}\n")
    print("| | " + " | ".join(f"{which}, points" for which in options.models) + " | passes with a gradient |")
    print("|---|" + "---|" * (len(options.models) + 1))
    for name, (method, samples) in ABLATION.items():
        columns, costs = [], []
        for which in options.models:
            means = []
            for seed in options.seeds:
                keys = [(which, seed, samples, sparsity, method, options.split) for sparsity in options.sparsities]
                rows = [cells[key] for key in keys if key in cells]
                costs += [row["gradients"] for row in rows]
                if len(rows) == len(keys):
                    means.append(100 * statistics.fmean(row["accuracy"] for row in rows))
            whole = len(means) == len(options.seeds)
            spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            columns.append(f"{statistics.fmean(means):.1f}{spread}" if whole else "–")
        print(f"| {name} | " + " | ".join(columns) + f" | {statistics.fmean(costs):.0f} |" if costs else f"| {name} | – |")


def report(cells: Rows, options: argparse.Namespace) -> None:
    print(f"{machine()}; {options.samples} scoring samples, seeds {options.seeds}, {options.split} accuracy")
    for which in options.models:
        dense = {
            cell[1]: row["dense"] for cell, row in cells.items()
            if (cell[0], cell[5]) == (which, options.split) and cell[1] in options.seeds
        }  # fmt: skip
        if not dense:
            continue
        print(f"\n{which}, dense {sum(dense.values()) / len(dense):.3f}\n")
        print("| method | " + " | ".join(f"{s:g}" for s in options.sparsities) + " | mean | KL, mean | seconds "
              "| passes with a gradient | without |")  # fmt: skip
        print("|---|" + "---|" * (len(options.sparsities) + 5))
        for method in options.methods:
            columns, every = [], []
            for sparsity in options.sparsities:
                keys = [(which, seed, options.samples, sparsity, method, options.split) for seed in options.seeds]
                rows = [cells[key] for key in keys if key in cells]
                every += rows
                columns.append(f"{sum(r['accuracy'] for r in rows) / len(rows):.3f}" if len(rows) == len(options.seeds) else "–")
            if len(every) < len(columns) * len(options.seeds):
                print(f"| {method} | " + " | ".join(columns) + " | – | – | – | – | – |")
                continue
            facts = ("accuracy", "kl", "seconds", "gradients", "forwards")
            means = [statistics.fmean(row[key] for row in every) for key in facts]
            print(f"| {method} | " + " | ".join(columns) + f" | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.1f} "
                  f"| {means[3]:.0f} | {means[4]:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
