"""The kernel machine against the model that it rewrites: answers, KL and error by nodes a step."""

from __future__ import annotations

import argparse
import time
from typing import Any

from prunekit.kernel import reconstruct
from prunekit.measure import accuracy, agreement, kl

from .common import function_of, note, short, table, trained

CASES = {"digits-cnn-sgd": "test", "modadd-transformer": "validation"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=32, help="rebuilt samples of each model (the paper: 2000)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 10, 100], help="midpoints a step")
    parser.add_argument("--tolerance", type=float, default=0.005, help="of the error-controlled rule, a sample and interval")


def run(chosen: argparse.Namespace) -> str:
    rows = []
    for name, split in CASES.items():
        case = trained(name, chosen.out)
        function = function_of(case)
        x, y = case.splits[split].batch(range(min(chosen.samples, len(case.splits[split]))))
        ways: dict[str, dict[str, Any]] = {f"{n}": {"tolerance": None, "nodes": n} for n in chosen.nodes}
        ways[f"tolerance {chosen.tolerance:g}"] = {"tolerance": chosen.tolerance}
        for way, how in ways.items():
            started = time.process_time()
            found = reconstruct(function, case.trajectory.segments(), x, y, **how)
            rows.append([
                name, way, f"{agreement(found.rebuilt, found.model):.3f}", f"{kl(found.rebuilt, found.model):.1e}",
                short(float(found.error.mean())), f"{accuracy(found.rebuilt, y):.3f} / {accuracy(found.model, y):.3f}",
                f"{found.evaluations / len(x) / case.trajectory.pieces:.1f}", f"{time.process_time() - started:.0f}",
                f"{int(found.residuals.argmax())} ({short(float(found.residuals.max() / found.residuals.sum()))})",
            ])  # fmt: skip
            note(f"{name}, {way}: {rows[-1]}")
    header = (
        "model", "nodes a step", "same answer", "KL, nats", "mean error", "accuracy, rebuilt / model", "evaluations", "seconds",
        "worst step (its share of the certificate)",
    )  # fmt: skip
    return (
        f"{chosen.samples} samples, all log-probabilities, forward mode. Evaluations: directional derivatives a step and "
        "sample.\n\n" + table(header, rows)
    )
