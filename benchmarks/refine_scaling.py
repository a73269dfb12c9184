"""How refine's time and memory grow with the model: MLPs and transformers of 10⁴ to 10⁷ parameters, random data, one thread.

A blame round, a gain round (both with their drop and their judging), and a step of learning, each in a process of its own, so
that each has its own peak of memory: how far it rises above what model, plan and samples take (torch being warmed up on the
smallest model). The unit of time is a forward and backward pass of the mean over the samples to learn from, measured beside it.
Reads /proc, so Linux.

    OMP_NUM_THREADS=1 python benchmarks/refine_scaling.py [--sizes 1e4 1e5] [--families mlp]
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from prunekit import Plan, make_plan
from prunekit.criteria import model_digest
from prunekit.criteria.scores import Scores
from prunekit.kernel import mean_gradient
from prunekit.measure import machine
from prunekit.models import digits_mlp, digits_transformer
from prunekit.repair.learn import learnt_masks
from prunekit.repair.objective import Objective, make_objective
from prunekit.repair.swaps import Weights
from prunekit.task import Classification
from prunekit.trajectory import Layout

SAMPLES = 256
STEPS = 5  # of learning, one of them judged, as in refine
MODELS: dict[str, dict[float, Callable[[], nn.Module]]] = {
    "mlp": {
        1e4: lambda: digits_mlp((70, 70)),
        1e5: lambda: digits_mlp((280, 280)),
        1e6: lambda: digits_mlp((962, 962)),
        1e7: lambda: digits_mlp((3125, 3125)),
    },
    "transformer": {
        1e4: lambda: digits_transformer(width=20, layers=2),
        1e5: lambda: digits_transformer(width=64, layers=2),
        1e6: lambda: digits_transformer(width=144, layers=4),
        1e7: lambda: digits_transformer(width=320, layers=8),
    },
}
Samples = tuple[Tensor, Tensor]
STAGES = {"blame": "blame round", "gain": "gain round", "learn": "step of learning"}


def one(family: str, size: float, stage: str) -> dict[str, float]:
    """What a stage takes: ``seconds``, ``mb`` of memory, ``pass`` seconds of one pass, ``parameters``."""
    torch.set_num_threads(1)
    _run(*_ready(family, min(MODELS[family])), stage)  # what torch itself loads and keeps, once
    model, plan, samples = _ready(family, size)
    before, _ = _memory_mb(reset=True)
    objective, seconds = _run(model, plan, samples, stage)
    memory = _memory_mb()[1] - before
    unit = _timed(lambda: mean_gradient(objective.function, objective.theta, objective.learn))
    return {"seconds": seconds, "mb": memory, "pass": unit, "parameters": objective.theta.numel()}


def _ready(family: str, size: float) -> tuple[nn.Module, Plan, Samples]:
    torch.manual_seed(0)
    model = MODELS[family][size]().eval()
    importance = {n: p.detach().abs() for n, p in model.named_parameters() if p.dim() > 1}
    facts = {
        "criterion": "benchmark", "group": "l2", "aggregation": None, "trajectory": "none", "model": model_digest(model),
        "prunable": list(importance),
    }  # fmt: skip
    plan = make_plan(Scores(importance, {}, facts), model, sparsity=0.9)
    return model, plan, (torch.randn(SAMPLES, 1, 8, 8), torch.randint(10, (SAMPLES,)))


def _run(model: nn.Module, plan: Plan, samples: Samples, stage: str) -> tuple[Objective, float]:
    """Seconds of the stage, and what it lowered."""
    pattern = Weights(plan, Layout.of(model), torch.device("cpu"))
    objective = make_objective(model, [samples], "kl", "margin", task=Classification())
    room = importlib.import_module("prunekit.repair.refine")
    best = room._Best(pattern, objective, pattern.keep, math.inf, math.inf)
    if stage == "learn":
        learnt = partial(learnt_masks, pattern, objective, pattern.magnitude(objective.theta), steps=STEPS)
        seconds = _timed(lambda: [best.offer(mask, {}) for _, mask in learnt()]) / STEPS
    else:
        with patch.object(room, "_ranking", lambda number: stage):
            seconds = _timed(lambda: room._swap(best, 1, 0.1, 0.5, 8, math.inf))
            seconds -= _timed(lambda: room._swap(best, 0, 0.1, 0.5, 8, math.inf))  # choosing the engine, once a refinement
    return objective, seconds


def _memory_mb(reset: bool = False) -> tuple[float, float]:
    """Resident memory of this process, now and at its peak since it was last reset, in MB (10^6 bytes)."""
    process = Path("/proc/self")
    if reset:
        (process / "clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    now, peak = (int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM"))
    return now, peak


def _timed(run: Callable[[], object], rounds: int = 3, enough: float = 5) -> float:
    """Median seconds of up to ``rounds`` runs, of fewer once ``enough`` seconds went by; after one that is not counted."""
    times: list[float] = []
    run()
    while len(times) < rounds and sum(times) < enough:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log value over log size, least squares."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=float, choices=list(MODELS["mlp"]), default=list(MODELS["mlp"]))
    parser.add_argument("--one", nargs=3, metavar=("FAMILY", "SIZE", "STAGE"), help="measure one in this process; prints JSON")
    options = parser.parse_args()
    if options.one:
        family, size, stage = options.one
        print(json.dumps(one(family, float(size), stage)))
        return
    print(f"{machine()}; {SAMPLES} samples, a quarter of which accepts")
    for family in options.families:
        columns = [f"{name}, s (passes) | MB (models)" for name in STAGES.values()]
        print(f"\n| {family}, parameters | pass, s | " + " | ".join(columns) + " |")
        print("|---|---|" + "---|---|" * len(STAGES))
        found: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
        for size in options.sizes:
            for stage, rows in found.items():
                command = [sys.executable, __file__, "--one", family, str(size), stage]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
                rows.append(json.loads(done.stdout))
            now = {stage: rows[-1] for stage, rows in found.items()}
            unit, parameters = statistics.median(row["pass"] for row in now.values()), now["blame"]["parameters"]
            columns = [
                f"{row['seconds']:.3g} ({row['seconds'] / unit:.1f}) | {row['mb']:.0f} ({row['mb'] * 1e6 / 4 / parameters:.1f})"
                for row in now.values()
            ]
            print(f"| {parameters:,} | {unit:.3g} | " + " | ".join(columns) + " |", flush=True)
        if len(options.sizes) > 1:
            print("| exponent of the last step | | " + " | ".join(_exponents(rows) for rows in found.values()) + " |")


def _exponents(rows: list[dict[str, float]]) -> str:
    """Of seconds and of memory in the parameters, between the two largest models; of seconds also fitted over all."""
    sizes = [row["parameters"] for row in rows]
    seconds, memory = ([row[key] for row in rows] for key in ("seconds", "mb"))
    last = f"{exponent(sizes[-2:], memory[-2:]):.2f}" if min(memory[-2:]) > 0 else "–"
    return f"{exponent(sizes[-2:], seconds[-2:]):.2f} (all: {exponent(sizes, seconds):.2f}) | {last}"


if __name__ == "__main__":
    main()
