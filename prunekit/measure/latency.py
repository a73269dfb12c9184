"""How long a forward pass takes, measured: medians of interleaved runs, with the machine named."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn


def machine() -> str:
    """Processor, threads and torch version, in words."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # no such file outside Linux: the name from platform stays
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@torch.no_grad()
def latencies(models: dict[str, nn.Module], x: Tensor, runs: int = 30, seconds: float = 1.0) -> dict[str, float]:
    """Median milliseconds of one forward pass of each model on the batch ``x``.

    The models take turns, so that a machine that drifts drifts for all; ``runs`` rounds, fewer if they would take
    longer than ``seconds`` (3 at least).
    """
    device = x.device
    for model in models.values():
        model.eval()
        for _ in range(3):
            model(x)
    times: dict[str, list[float]] = {name: [] for name in models}
    deadline = time.perf_counter() + seconds
    for round_ in range(runs):
        if round_ >= 3 and time.perf_counter() > deadline:
            break
        for name, model in models.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            model(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
