"""Every model of the zoo by name, and the two factories that its recipes name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import plain_models, timm_models, torchvision_models, transformers_models
from benchmarks.zoo.entry import Entry

MODELS: dict[str, Entry] = {
    **torchvision_models.MODELS,
    **timm_models.MODELS,
    **transformers_models.MODELS,
    **plain_models.MODELS,
}


def build(name: str) -> nn.Module:
    """The model of that name with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name].build()


def data(name: str) -> Mapping[str, Any]:
    """The four splits of that model's data."""
    return MODELS[name].data()


def missing(name: str) -> str | None:
    """The first package that this model needs and that is not installed."""
    return next((p for p in MODELS[name].packages if importlib.util.find_spec(p) is None), None)
