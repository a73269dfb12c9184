"""What repairing a mask gains: one-shot unstructured masks of the same size, test accuracy, no weight updated.

Magnitude, tempered per-sample Taylor, both refined ones, and the rivals of prunekit.search.rivals, all from the same
scoring samples (500 of the training split by default; a quarter of them only accepts). The classifier is pruned too.

    OMP_NUM_THREADS=1 python benchmarks/refine.py [--seeds 0 1] [--samples 500] [--methods magnitude refine] [--seconds 600]

Every finished cell is a line of --out, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Plan, Scores, make_plan, masked, refine
from prunekit.criteria import model_digest
from prunekit.data import digits
from prunekit.measure import accuracy, divergence, machine, predict
from prunekit.recipe import Recipe
from prunekit.search.objective import make_objective
from prunekit.search.patterns import Weights
from prunekit.search.rivals import RIVALS
from prunekit.training import train
from prunekit.trajectory import Layout

RECIPE = Path(__file__).parent.parent / "recipes" / "digits-cnn.yaml"
SPARSITIES = (0.7, 0.8, 0.9, 0.95, 0.97)


def mlp() -> nn.Module:
    """64-256-128-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(which: str, seed: int) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The model of the recipe (or the MLP in its place), trained as the recipe says, and the data's splits."""
    recipe = Recipe.load(RECIPE)
    options = recipe.train
    data = digits(seed, **recipe.data.args)  # type: ignore[union-attr]
    torch.manual_seed(seed)
    model = Recipe.of({**recipe.model_dump(mode="json"), "seed": seed}, RECIPE).build_model() if which == "cnn" else mlp()
    x, y = data["train"]
    steps = options.epochs * -(-len(x) // options.batch_size)
    optimizer, scheduler = recipe.build_optimizer(model, steps)
    train(
        model, optimizer, scheduler, F.cross_entropy, lambda i: (x[i], y[i]), len(x),
        epochs=options.epochs, batch_size=options.batch_size, seed=seed,
    )  # fmt: skip
    return model.eval(), data


def plan_of(model: nn.Module, importance: dict[str, Tensor], sparsity: float) -> Plan:
    facts = {
        "criterion": "benchmark", "group": "l2", "aggregation": None, "trajectory": "none", "model": model_digest(model),
        "prunable": list(importance),
    }  # fmt: skip
    return make_plan(Scores(importance, {}, facts), model, sparsity=sparsity)


def magnitude(model: nn.Module, batches: list[tuple[Tensor, Tensor]], sparsity: float, seed: int) -> Plan:
    return plan_of(model, {n: p.detach().abs() for n, p in model.named_parameters() if p.dim() > 1}, sparsity)


def _by_rival(name: str, plan: Plan, model: nn.Module, batches: list[tuple[Tensor, Tensor]], seed: int) -> Plan:
    pattern = Weights(plan, Layout.of(model), torch.device("cpu"))
    objective = make_objective(model, batches, "kl", "margin", seed=seed)
    return pattern.plan(RIVALS[name](pattern, objective, seed))


def rival(name: str) -> Callable[..., Plan]:
    return lambda model, batches, sparsity, seed: _by_rival(name, magnitude(model, batches, sparsity, seed), model, batches, seed)


def repaired(model: nn.Module, batches: list[tuple[Tensor, Tensor]], sparsity: float, seed: int, **options: object) -> Plan:
    return refine(magnitude(model, batches, sparsity, seed), model, batches, seed=seed, **options)  # type: ignore[arg-type]


METHODS: dict[str, Callable[..., Plan]] = {
    "magnitude": magnitude,
    **{name: rival(name) for name in RIVALS},
    "learn": partial(repaired, rounds=0),
    "refine": partial(repaired, learn=False),
    "refine+learn": repaired,
}
SHARES = {f"refine, {share:g}": partial(repaired, learn=False, share=share) for share in (0.06, 0.15, 0.25)}
"""Of the kept weights that the first round swaps; 0.1 is ``refine`` itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["mlp", "cnn"], default=["mlp", "cnn"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SHARES], default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="what accuracy is measured on")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600, help="stop after this long; call again to go on")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-refine.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    cells = {tuple(row["cell"]): row for row in map(json.loads, lines)}
    deadline = time.monotonic() + options.seconds
    for which in options.models:
        for seed in options.seeds:
            wanted = [(which, seed, options.samples, s, m, options.split) for s in options.sparsities for m in options.methods]
            missing = [cell for cell in wanted if cell not in cells]
            if not missing or time.monotonic() > deadline:
                continue
            model, data = trained(which, seed)
            x, y = data["train"]
            batches, test = [(x[: options.samples], y[: options.samples])], [data[options.split]]
            dense, labels = predict(model, test)
            for cell in missing:
                if time.monotonic() > deadline:
                    break
                started = time.perf_counter()
                plan = {**METHODS, **SHARES}[cell[4]](model, batches, cell[3], seed)
                seconds = time.perf_counter() - started
                outputs, _ = predict(masked(model, plan), test)
                row = {
                    "cell": list(cell), "accuracy": accuracy(outputs, labels), "kl": divergence(outputs, dense),
                    "dense": accuracy(dense, labels), "seconds": seconds, "sparsity": plan.sparsity()["prunable"],
                }  # fmt: skip
                cells[cell] = row
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    report(cells, options)


def report(cells: dict[tuple[object, ...], dict[str, float]], options: argparse.Namespace) -> None:
    print(f"{machine()}; {options.samples} scoring samples, seeds {options.seeds}, {options.split} accuracy")
    for which in options.models:
        dense = {
            cell[1]: row["dense"] for cell, row in cells.items()
            if (cell[0], cell[5]) == (which, options.split) and cell[1] in options.seeds
        }  # fmt: skip
        if not dense:
            continue
        print(f"\n{which}, dense {sum(dense.values()) / len(dense):.3f}\n")
        print("| method | " + " | ".join(f"{s:g}" for s in options.sparsities) + " | mean | KL, mean | seconds |")
        print("|---|" + "---|" * (len(options.sparsities) + 3))
        for method in options.methods:
            columns, every = [], []
            for sparsity in options.sparsities:
                keys = [(which, seed, options.samples, sparsity, method, options.split) for seed in options.seeds]
                rows = [cells[key] for key in keys if key in cells]
                every += rows
                columns.append(f"{sum(r['accuracy'] for r in rows) / len(rows):.3f}" if len(rows) == len(options.seeds) else "–")
            if len(every) < len(columns) * len(options.seeds):
                print(f"| {method} | " + " | ".join(columns) + " | – | – | – |")
                continue
            means = [sum(row[key] for row in every) / len(every) for key in ("accuracy", "kl", "seconds")]
            print(f"| {method} | " + " | ".join(columns) + f" | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.1f} |")


if __name__ == "__main__":
    main()
