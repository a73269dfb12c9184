"""Gumbel-sigmoid gates, learnt end to end: after MaskLLM (arXiv 2409.17481) and LEAP for single weights.

A logit a weight; the model runs with ``sigmoid((logit + Gumbel noise - threshold) / temperature)``, where the threshold keeps the
expected number of open gates at the asked count, so that no penalty has to be tuned. The temperature falls from 1 to 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.repair.objective import Objective
from prunekit.repair.swaps import Weights

HOT, COLD = 1.0, 0.1


def gumbel_gates(pattern: Weights, objective: Objective, seed: int = 0, *, steps: int = 300, lr: float = 0.05) -> Tensor:
    """The mask of the lowest divergence on the accept part, looked at every 5 steps; starts at log-magnitudes."""
    theta = objective.theta
    size = pattern.magnitude(theta)
    logits = (size / size.mean().clamp_min(1e-30)).clamp_min(1e-6).log()
    optimizer = torch.optim.Adam([logits], lr=lr)
    generator = torch.Generator(device=theta.device).manual_seed(seed)
    keep = pattern.select(size)
    lowest = objective.on_accept(pattern.expand(keep.to(theta.dtype)))
    samples = objective.learn.samples
    for step in range(1, steps + 1):
        temperature = HOT * (COLD / HOT) ** (step / steps)
        uniform = torch.rand(logits.shape, generator=generator, device=theta.device, dtype=theta.dtype).clamp(1e-6, 1 - 1e-6)
        noise = uniform.log() - (-uniform).log1p()  # the difference of two Gumbel variables
        leaf = logits.detach().requires_grad_()
        threshold = logits.sort(descending=True).values[min(pattern.count, len(logits) - 1)]
        gates = torch.sigmoid((leaf - threshold + temperature * noise) / temperature)
        gradient = torch.zeros_like(logits)
        for x, y in objective.learn:
            point = theta * pattern.expand(gates)
            slope = objective.function.gradient(point.detach(), x, y, point.new_full((), 1 / samples))[1]
            gradient += torch.autograd.grad(point, leaf, slope, retain_graph=True)[0]
        logits.grad = gradient
        optimizer.step()
        if step % 5 == 0 or step == steps:
            candidate = pattern.select(logits)
            value_there = objective.on_accept(pattern.expand(candidate.to(theta.dtype)))
            if value_there < lowest:
                keep, lowest = candidate, value_there
    return keep
