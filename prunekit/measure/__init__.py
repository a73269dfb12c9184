"""Figures of models: what a measure is, accuracy, agreement, KL, sizes, MACs, latency. Knows no room but ``batch``."""

from prunekit.measure.classes import accuracy, agreement, divergence, kl
from prunekit.measure.latency import latencies, machine
from prunekit.measure.measure import Lost, Measure, Told, choosing, merit, told
from prunekit.measure.size import sizes

__all__ = [
    "Lost",
    "Measure",
    "Told",
    "accuracy",
    "agreement",
    "choosing",
    "divergence",
    "kl",
    "latencies",
    "machine",
    "merit",
    "sizes",
    "told",
]
