"""What a verb prints for people: short tables on stdout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prunekit.report.terminal.comparing import compare, score, sensitivity, study
from prunekit.report.terminal.evaluating import evaluate
from prunekit.report.terminal.explaining import explain
from prunekit.report.terminal.pruning import prune
from prunekit.report.terminal.telling import info, report, trust
from prunekit.report.terminal.training import imported, train

__all__ = ["SHOW"]

SHOW: dict[str, Callable[[Any], None]] = {
    "train": train,
    "import": imported,
    "score": score,
    "compare": compare,
    "study": study,
    "prune": prune,
    "eval": evaluate,
    "sensitivity": sensitivity,
    "explain": explain,
    "report": report,
    "info": info,
    "trust": trust,
}
"""Verb -> what prints its result."""
