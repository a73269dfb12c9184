"""How long a forward pass takes: interleaved passes, medians with their spread, and under what conditions."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from prunekit import ranks
from prunekit.batch import Inputs, call, fresh, leaves
from prunekit.measure.undisturbed import placed, undisturbed

Watch = Callable[[nn.Module, Inputs], float]
"""Milliseconds of one pass of a model."""
CONFIDENCE = 0.95
WITHIN = 0.03
"""A measurement goes on until its spread is this share of the figure; what stays above it was measured on a noisy machine."""
WARM_UP, FEWEST, MOST = 3, 6, 640
"""Passes of each model before it counts; rounds at least, whatever they take, unless fewer are asked for; rounds at most."""
BLOCKS = 10


class Speed(TypedDict):
    """A pruned model's speed beside the dense one's: samples a batch, median milliseconds, their ratio and its interval."""

    batch: int
    dense_ms: float
    pruned_ms: float
    speedup: float
    low: float
    high: float
    rounds: int


def machine(device: torch.device | str = "cpu") -> str:
    """Processor, accelerator, threads and torch version, in words."""
    device = torch.device(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # no such file outside Linux: the name from platform stays
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device}), {name}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def conditions() -> str:
    """How passes are timed, in words."""
    return (
        f"eager, as loaded: torch.compile off, channels_last off; {WARM_UP} passes to warm up, then the models take turns; "
        f"medians, intervals of {CONFIDENCE:.0%} confidence"
    )


@dataclass(frozen=True)
class Interval:
    """A median, and between which figures the true one lies with ``CONFIDENCE``."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the interval's width, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else float("inf")

    @property
    def noisy(self) -> bool:
        """Whether the machine was too busy with other things for a figure that holds to ``WITHIN``."""
        return self.spread > WITHIN

    def told(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every round by model; in a round every model has one pass."""

    rounds: Mapping[str, Sequence[float]]

    def ms(self, name: str) -> Interval:
        return interval(self.rounds[name])

    def speedup(self, name: str, over: str = "dense") -> Interval:
        """How many times as fast ``name`` is as ``over``: of each round the ratio, so that what slows a round slows both."""
        return interval([slow / fast for slow, fast in zip(self.rounds[over], self.rounds[name], strict=True)])

    def speed(self, name: str, batch: int) -> Speed:
        """What artifacts hold of ``name`` beside ``dense``."""
        found = self.speedup(name)
        return {
            "batch": batch, "dense_ms": self.ms("dense").median, "pruned_ms": self.ms(name).median, "speedup": found.median,
            "low": found.low, "high": found.high, "rounds": len(self.rounds[name]),
        }  # fmt: skip


def noisy(speed: Mapping[str, Any]) -> bool:
    """Whether ``Speed`` was measured on a machine that was too busy; see ``Interval``."""
    return Interval(speed["speedup"], speed["low"], speed["high"]).noisy


def interval(values: Sequence[float]) -> Interval:
    """The median of figures in the order in which they were measured, and an interval of ``CONFIDENCE`` for it.

    Passes that follow each other resemble each other, so the figures are cut into ``BLOCKS`` blocks of neighbours. The interval
    lies between two of the blocks' sorted medians, the ``k``-th from below and from above, where ``k`` is the largest number for
    which ``1 - 2 P(X < k) >= CONFIDENCE``, ``X`` binomial with one half (the sign test's interval of a median): for ten blocks
    the second and the ninth, with 97.9 %. It supposes nothing about the distribution, and fewer than six figures, which cannot
    have such an interval, get their lowest and highest.
    """
    count = min(BLOCKS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    medians = sorted(statistics.median(values[a:b]) for a, b in pairwise(edges))
    beyond, below = 0, 0  # ranks left out on either side, and 2^count P(X <= beyond)
    while 2 * (below := below + comb(count, beyond)) <= (1 - CONFIDENCE) * 2**count:
        beyond += 1
    beyond = max(beyond - 1, 0)
    middle = statistics.median(values)
    return Interval(middle, min(medians[beyond], middle), max(medians[-1 - beyond], middle))


@torch.no_grad()
def timed(
    models: Mapping[str, nn.Module],
    x: Inputs,
    seconds: float = 2.0,
    most: int = MOST,
    watch: Watch | None = None,
    warm_up: int = WARM_UP,
) -> Timing:
    """Rounds in which every model has one pass on the batch ``x``, in turns from the first to the last and back.

    After 20 rounds, 40, 80 and so on it looks whether every ratio to the first model (of one model alone, its time) is known to
    ``WITHIN``, and ends there; else when ``seconds`` of passes are over (``FEWEST`` rounds at least) or after ``most`` rounds.
    Models are left as they are, training mode included; each gets ``x`` on its own device and in its own type, anew for every
    pass, so that a cache among the inputs does not grow. Of several ranks the first one does this, and the others wait.

    Args:
        watch: times a pass; the machine's clock when None.
        warm_up: passes of each model before it counts.
    """
    return Timing(ranks.from_first(lambda: _rounds(models, x, seconds, most, watch or one_pass, warm_up)))


def _rounds(
    models: Mapping[str, nn.Module], x: Inputs, seconds: float, most: int, watch: Watch, warm_up: int
) -> dict[str, list[float]]:
    names = list(models)
    found: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
            for _ in range(warm_up):
                watch(model, placed(model, x))
        look, spent = 20, 0.0
        for number in range(1, most + 1):
            for name in names if number % 2 else reversed(names):
                took = watch(models[name], placed(models[name], x))
                found[name].append(took)
                spent += took / 1e3
            if number >= FEWEST and spent > seconds:
                break
            if number == look:
                look *= 2
                timing = Timing(found)
                others = [timing.speedup(name, names[0]) for name in names[1:]] or [timing.ms(names[0])]
                if not any(each.noisy for each in others):
                    break
    return found


def latencies(models: Mapping[str, nn.Module], x: Inputs, runs: int = 30, seconds: float = 1.0) -> dict[str, float]:
    """Median milliseconds of one forward pass of each model on the batch ``x``, in ``runs`` rounds at most; see ``timed``."""
    timing = timed(models, x, seconds, runs)
    return {name: timing.ms(name).median for name in models}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """While inside, torch computes with so many threads; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_pass(model: nn.Module, inputs: Inputs) -> float:
    """Milliseconds of one pass, waiting for accelerators the model or its inputs are on."""
    given = fresh(inputs)  # which the model may change in place
    devices = {t.device for t in [*model.parameters(), *model.buffers(), *leaves(inputs)] if t.device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call(model, given)
    for device in devices:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)
