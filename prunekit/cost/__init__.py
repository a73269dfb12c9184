"""What the work will cost, before it begins: time, memory and bytes over the wire, by a few constants (docs/scale.md)."""

from prunekit.cost.jobs import counterfactual, evaluate, gradients, learn, refine, score_path, tune
from prunekit.cost.machine import Machine
from prunekit.cost.model import Shape
from prunekit.cost.work import Work

__all__ = ["Machine", "Shape", "Work", "counterfactual", "evaluate", "gradients", "learn", "refine", "score_path", "tune"]
