"""How many nodes a step does ranking weights take on a run of yours? Rank correlation with 64 nodes, by nodes a step.

    OMP_NUM_THREADS=1 python benchmarks/ranking.py RUN [--samples 12]

RUN: a folder that `prunekit run` or `prunekit train` made. Importances are `Σ_x |ψ(x)|` of the margin on scoring samples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from prunekit.kernel import ModelFunction, attribute
from prunekit.measure import machine
from prunekit.verbs.run_folder import Run

CONVERGED = 64
TRIED: list[tuple[int, tuple[int, int] | None]] = [(1, None), (1, (4, 32)), (2, None), (4, None)]


def importances(run: Run, samples: int, nodes: int, early: tuple[int, int] | None) -> Tensor:
    """``(P,)``."""
    x, y = (t[:samples] for t in run.evidence.samples())
    path = run.trajectory
    function = ModelFunction(run.model, path.layout, path.fixed, "margin")
    parts = attribute(function, path.segments, x, y, nodes=nodes, early=early)
    sums = [torch.cat([s.abs().sum((0, 1)).flatten() for s in part.scores.values()]) for part in parts]
    return torch.stack(sums).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(options.run)
    print(f"{machine()}; {len(run.trajectory)} steps, {options.samples} samples, margin")
    converged = importances(run, options.samples, CONVERGED, None)
    for nodes, early in TRIED:
        started = time.process_time()
        found = importances(run, options.samples, nodes, early)
        seconds = time.process_time() - started
        rank = spearmanr(found.numpy(), converged.numpy()).statistic
        off = float((found - converged).abs().sum() / converged.sum())
        named = f"{nodes} a step" + (f", {early[1]} in each of the first {early[0]}" if early else "")
        print(f"{named:38s} Spearman {rank:.5f}, relative difference {off:.4f}, {seconds:.1f} processor s", flush=True)


if __name__ == "__main__":
    main()
