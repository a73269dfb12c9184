"""Figures of models: what a measure is, accuracy, agreement, KL, sizes, MACs, latency. Knows no room but ``batch``."""

from prunekit.measure.classes import accuracy, agreement, divergence
from prunekit.measure.latency import latencies, machine
from prunekit.measure.measure import Measure
from prunekit.measure.size import sizes

__all__ = ["Measure", "accuracy", "agreement", "divergence", "latencies", "machine", "sizes"]
