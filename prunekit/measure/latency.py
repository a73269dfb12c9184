"""How long a forward pass takes, measured: medians of interleaved runs, with the machine named."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from prunekit.batch import Inputs, call, leaves
from prunekit.measure.undisturbed import placed, undisturbed


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
def latencies(models: Mapping[str, nn.Module], x: Inputs, runs: int = 30, seconds: float = 1.0) -> dict[str, float]:
    """Median milliseconds of one forward pass of each model on the batch ``x``.

    The models take turns, so that a machine that drifts drifts for all; ``runs`` rounds, fewer if they would take
    longer than ``seconds`` (3 at least). Models are left as they are, training mode included; each gets ``x`` on its own device
    and in its own type, anew for every pass, so that a cache among the inputs does not grow.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
            for _ in range(3):
                _timed(model, placed(model, x))
        deadline = time.perf_counter() + seconds
        for round_ in range(runs):
            if round_ >= 3 and time.perf_counter() > deadline:
                break
            for name, model in models.items():
                times[name].append(_timed(model, placed(model, x)))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(model: nn.Module, inputs: Inputs) -> float:
    """Milliseconds of one pass, waiting for accelerators the model or its inputs are on."""
    devices = {t.device for t in [*model.parameters(), *model.buffers(), *leaves(inputs)] if t.device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call(model, inputs)
    for device in devices:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)
