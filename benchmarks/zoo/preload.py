"""What every process of the zoo needs, imported once in the server that they are forked from."""

from __future__ import annotations

import contextlib

import matplotlib.pyplot
import torch
import torch._dynamo  # forward mode imports it when it is first asked for

from benchmarks.zoo import steps
from benchmarks.zoo.operators import declare
from prunekit.verbs import evaluating, explaining, pruning, scoring, training

torch.set_num_threads(1)
declare()
for _package in ("torchvision", "timm", "transformers"):
    with contextlib.suppress(ImportError):  # models that need it are skipped by name
        __import__(_package)

__all__ = ["evaluating", "explaining", "matplotlib", "pruning", "scoring", "steps", "training"]
