"""Accuracy, agreement, KL, sizes, MACs, latency. Knows no other room."""

from prunekit.measure.fidelity import accuracy, agreement, divergence, fidelity, predict
from prunekit.measure.latency import latencies, machine
from prunekit.measure.size import sizes

__all__ = ["accuracy", "agreement", "divergence", "fidelity", "latencies", "machine", "predict", "sizes"]
