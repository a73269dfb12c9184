"""Optimizers and schedules of the rate as a recipe describes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from prunekit.recipe.training import Optimizer, RateSchedule


def optimizer_of(model: nn.Module, o: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that ``o`` describes, for the trained parameters of ``model``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if o.name == "sgd":
        return torch.optim.SGD(parameters, o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay)
    kind = torch.optim.AdamW if o.name == "adamw" else torch.optim.Adam
    return kind(parameters, o.lr, betas=o.betas, weight_decay=o.weight_decay)


def scheduler_of(optimizer: torch.optim.Optimizer, steps: int, schedule: RateSchedule) -> Any:
    """The schedule of the rate over ``steps`` steps, from the optimizer's own rate; None for a constant one."""
    if schedule.name == "onecycle":
        peak, rise = optimizer.param_groups[0]["lr"], schedule.warmup
        if rise * steps == 1:  # torch divides by the length of the rise, one step less
            rise = math.nextafter(rise, 1.0)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=rise, cycle_momentum=False)
    if schedule.name == "triangular":
        peak = schedule.warmup * steps
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(step / peak, max(0.0, (steps - step) / (steps - peak)))
        )
    if schedule.name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return None
