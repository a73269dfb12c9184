"""How small can the digits CNN get for one point of validation accuracy? `prune --max-accuracy-drop 1` over three seeds.

    python benchmarks/smallest.py [--out runs/smallest] [--seeds 0 1 2]

Each seed: train the recipe, score, prune channels in rounds with fine-tuning to the smallest model that holds the budget on
validation data, and only then look at test data. Latency is measured at batch 64, dense and pruned in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.outputs import predict
from prunekit import load
from prunekit.measure import accuracy, latencies, machine, sizes
from prunekit.recipe import Prune, Recipe
from prunekit.verbs.pruning import prune_run
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scoring import score_run
from prunekit.verbs.training import train_run

RECIPE = Path(__file__).parents[1] / "recipes" / "digits-cnn.yaml"


def one(out: Path, seed: int, criterion: str, rounds: int, epochs: int) -> dict[str, float]:
    recipe = Recipe.load(RECIPE)
    recipe = Recipe.of({**recipe.model_dump(mode="json"), "seed": seed}, RECIPE)
    train_run(recipe, out, announce=lambda text: None)
    run = Run(out)
    score_run(run, [criterion])
    wanted = Prune.of(
        {
            "name": "smallest", "criterion": criterion, "structure": "channels", "max_accuracy_drop": 1, "allocation": "mean",
            "schedule": {"name": "iterative", "rounds": rounds}, "finetune": {"epochs": epochs},
        },
        "smallest",
    )  # fmt: skip
    done = prune_run(run, wanted)
    folder = out / "pruned" / "smallest"
    facts = json.loads((folder / "prunekit.json").read_text(encoding="utf-8"))["facts"]
    small, dense = load(folder, run.new_model), run.model
    batches = run.batches("test")
    one_sample = run.example[:1]
    x = run.splits["test"].batch([i % len(run.splits["test"]) for i in range(64)])[0]
    ratios = []
    for _ in range(5):
        found = latencies({"dense": dense, "pruned": small}, x)
        ratios.append(found["pruned"] / found["dense"])
    return {
        "seed": seed,
        "sparsity": done["asked"],
        "kept_percent": 100 * sizes(small, one_sample)["parameters"] / sizes(dense, one_sample)["parameters"],
        "validation_drop": facts["reached"],
        "its_error": facts["standard_error"],
        "dense_test": 100 * accuracy(*predict(dense, batches)),
        "pruned_test": 100 * accuracy(*predict(small, batches)),
        "latency_ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smallest"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--criterion", default="magnitude")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25, help="of fine-tuning, after each round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rows = []
    for seed in options.seeds:
        rows.append(one(options.out / f"seed{seed}", seed, options.criterion, options.rounds, options.epochs))
        print(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
    drop = [row["dense_test"] - row["pruned_test"] for row in rows]
    spread = f" ± {statistics.stdev(drop):.2f}" if len(drop) > 1 else ""
    kept, ratio = max(row["kept_percent"] for row in rows), max(row["latency_ratio"] for row in rows)
    print(f"kept at most {kept:.1f} % of the parameters; test accuracy falls by {statistics.fmean(drop):.2f}{spread} points")
    print(f"latency at batch 64, pruned over dense, at most {ratio:.2f}")


if __name__ == "__main__":
    main()
