"""Whether refining again helps: refine, fine-tune, refine, fine-tune against as many steps after refining once. Validation data.

    python benchmarks/refine_again.py STUDY [--cases …] [--seeds 0 1] [--sparsities 0.9 0.97] [--epochs 25] [--again 1]

STUDY is what ``prunekit compare recipes/refine.yaml --out STUDY`` wrote: its run folders are read, nothing is written there.
Masks are refined from magnitude's, by the study's allocation, from 500 training samples, judged on its scoring samples.

- ``tuned``: refined once, then fine-tuned in one run. ``in runs``: the same in ``again + 1`` runs of the rate's schedule.
- ``swaps``: swaps alone between the runs, no learning. ``learnt``: as ``prunekit prune --refine-again`` does.
- ``dense``, ``zero``: the value with which a weight comes back.

A figure is accuracy in % and the divergence from the dense model, means over what is named.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.outputs import fidelity, predict
from prunekit import Plan
from prunekit.recipe import Finetune, Steps
from prunekit.search.compare import Candidates
from prunekit.search.study import split
from prunekit.search.ways import RepairSamples, refine_plan
from prunekit.steps import Tuner
from prunekit.steps.again import refine_again
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scheduling import finetuning_of

SAMPLES = 500
METHODS = ("tuned", "in runs", "swaps, dense", "swaps, zero", "learnt, dense", "learnt, zero")


def measured(study: Path, case: str, seed: int, sparsity: float, epochs: int, again: int) -> dict[str, tuple[float, float]]:
    """Accuracy and divergence by method, on validation data."""
    run = Run(study / "runs" / f"{case}-seed{seed}")
    cell = study / "cells" / f"{case}-seed{seed}" / "unstructured-refined" / f"magnitude-{sparsity:g}.json"
    allocation = json.loads(cell.read_text())["made_from"]["allocation"] if cell.exists() else "global"
    batches = run.batches("validation")
    candidates = Candidates(run.model, {"magnitude": run.scores("magnitude")}, batches, ["unstructured"], [])
    material = RepairSamples(run.evidence, run.batches("train", SAMPLES), run.evidence.samples(), run.example, seed)
    plan = refine_plan(candidates.plan("unstructured", "magnitude", allocation, sparsity), run.model, material)
    how = finetuning_of(run, Steps(finetune=Finetune(epochs=epochs)))

    def tuned(method: str) -> tuple[float, float]:
        model, current = copy.deepcopy(run.model), plan
        torch.manual_seed(how.seed)
        kind, _, value = method.partition(", ")

        def refined(given: Plan, base: nn.Module, reference: nn.Module) -> Plan:
            return refine_plan(given, base, material, learn=kind == "learnt", reference=reference)

        with Tuner(model, plan.masks(), how, None, {}) as tuner:
            for number, part in enumerate([epochs] if kind == "tuned" else split(epochs, again + 1)):
                if number and kind in ("swaps", "learnt"):
                    before = current
                    current = refine_again(tuner, current, run.model, refined)
                    if value == "zero":
                        _empty(model, before, current)
                tuner.run(how.seed + number, epochs=part)
        found = fidelity(*predict(model.eval(), batches), candidates.dense)
        return 100 * found["accuracy"], found["kl"]

    return {method: tuned(method) for method in METHODS}


@torch.no_grad()
def _empty(model: nn.Module, before: Plan, after: Plan) -> None:
    for name, parameter in model.named_parameters():
        if name in before.keep:
            parameter.mul_((before.keep[name] | ~after.keep[name]).to(parameter))


def main() -> int:
    asked = argparse.ArgumentParser(description="Refining again against refining once.")
    asked.add_argument("study", type=Path)
    asked.add_argument("--cases", nargs="+", default=["transformer-sgd", "transformer-adamw", "mlp-sgd", "cnn-adamw"])
    asked.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    asked.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.97])
    asked.add_argument("--epochs", type=int, default=25)
    asked.add_argument("--again", type=int, default=1)
    options = asked.parse_args()
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for case in options.cases:
            for sparsity in options.sparsities:
                row = measured(options.study, case, seed, sparsity, options.epochs, options.again)
                found.setdefault((case, sparsity), []).append(row)
                print(f"{case} seed {seed}, {sparsity:g}: " + _line([row], ", "), flush=True)
    print("\n| | " + " | ".join(METHODS) + " |\n|" + "---|" * (1 + len(METHODS)))
    for (case, sparsity), rows in sorted(found.items()):
        print(f"| {case}, {sparsity:g} | " + _line(rows, " | ", named=False) + " |")
    everything = [row for rows in found.values() for row in rows]
    print("| mean | " + _line(everything, " | ", named=False) + " |")
    return 0


def _line(rows: list[dict[str, Any]], between: str, named: bool = True) -> str:
    means = {m: [statistics.fmean(row[m][i] for row in rows) for i in (0, 1)] for m in METHODS}
    return between.join(f"{m + ' ' if named else ''}{a:.2f} ({k:.4f})" for m, (a, k) in means.items())


if __name__ == "__main__":
    raise SystemExit(main())
