"""Figures of models: what a measure is, accuracy, agreement, KL, sizes, MACs, latency. Knows ``batch`` and the bars alone."""

from prunekit.measure.classes import accuracy, agreement, divergence, kl
from prunekit.measure.latency import Speed, Timing, conditions, latencies, machine, noisy, threads, timed
from prunekit.measure.measure import Lost, Measure, Told, choosing, merit, told
from prunekit.measure.size import sizes, zipped

__all__ = [
    "Lost",
    "Measure",
    "Speed",
    "Timing",
    "Told",
    "accuracy",
    "agreement",
    "choosing",
    "conditions",
    "divergence",
    "kl",
    "latencies",
    "machine",
    "merit",
    "noisy",
    "sizes",
    "threads",
    "timed",
    "told",
    "zipped",
]
