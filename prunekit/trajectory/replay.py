"""Taking the steps of a recorded training again, to have the states that were not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError, UsageError
from prunekit.trajectory.bare import bare, bare_optimizers, named_tensors
from prunekit.trajectory.loading import load_into
from prunekit.trajectory.recorder import Recorder
from prunekit.trajectory.rules import StepLog, optimizer_parts
from prunekit.trajectory.trajectory import Trajectory


def replay(
    trajectory: Trajectory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    batch: Callable[..., tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    folder: str | Path,
    *,
    second_moments: bool = False,
    tolerance: float = 1e-5,
    tick: Callable[[int], None] = lambda amount: None,
) -> Trajectory:
    """Trains ``model`` again along ``trajectory`` and records every state into ``folder``.

    Costs as much time as the training did, and as much disk as a recording of every state. Same batches, rates, clipping,
    micro-batch weights, augmentation seeds and dropout noise; on the same machine and thread count the states are
    bit-identical unless gradients were accumulated or scaled in another order of operations.

    Args:
        trajectory: with batches noted for every step; left as it is.
        model, optimizer: of the same kind as were recorded, several optimizers in the same order; their present weights and
            state are not used.
        batch: ``batch(indices)``, or ``batch(indices, seed)`` where a seed was noted, -> inputs and labels.
        loss: the mean loss that was trained on.
        second_moments: record Adam's ``v``, whether or not the trajectory holds it.
        tolerance: largest difference to a state that was kept, relative to its largest weight.
        tick: called once per step.

    Raises:
        UsageError: steps whose batches were not noted, or weights that were set and not stepped to.
        PrunekitError: the replayed weights leave the recorded ones; names the step. Loss, data or optimizer are others.
    """
    for index in range(len(trajectory)):
        step = trajectory.step(index)
        if not step.moved:
            raise UsageError(f"{trajectory.folder}: step {index} set the weights (pruning, averages) and cannot be replayed")
        if step.batches is None:
            raise UsageError(f"{trajectory.folder}: step {index} has no sample indices (recorder.batch); it cannot be replayed")
    model = bare(model)
    trajectory.layout.check(model)
    load_into(model, trajectory.model_state(0), trajectory.folder)
    names, optimizers = dict(model.named_parameters()), bare_optimizers(optimizer)
    owners = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
    for one in optimizers:
        one.state.clear()
    for key, value in trajectory.start_optimizer.items():
        name, entry = key.rsplit("|", 1)
        owners[id(names[name])].state[names[name]][entry] = value.clone()
    if len(optimizers) != max(1, len(optimizer_parts(trajectory.header["optimizer"]))):
        raise UsageError(f"{trajectory.folder}: was trained by another number of optimizers than {len(optimizers)}")
    model.train()
    options: dict[str, Any] = {"second_moments": second_moments, "snapshot_every": 0, "alone": True}
    with Recorder(folder, model, optimizers, trajectory.provenance, **options) as recorder:
        for index in range(len(trajectory)):
            _step(trajectory, index, model, optimizers, batch, loss, recorder)
            if index + 1 in trajectory.kept:
                _compare(trajectory, index + 1, model, tolerance)
            tick(1)
    return Trajectory(folder)


def _step(
    trajectory: Trajectory,
    index: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Callable[..., tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    recorder: Recorder,
) -> None:
    step: StepLog = trajectory.step(index)
    random = trajectory.random_states(index)
    optimizer = optimizers[step.optimizer]
    for group, options in zip(optimizer.param_groups, step.groups, strict=False):  # groups may have been added later
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items() if k in group})
    if step.behind:  # the gradient is there: another optimizer has stepped on it
        optimizer.step()
        return
    for one in optimizers:
        one.zero_grad()
    device = next(model.parameters()).device
    for number, (indices, weight, seed) in enumerate(zip(step.batches or (), step.weights, step.seeds, strict=True)):
        where = torch.tensor(indices)
        x, y = batch(where) if seed is None else batch(where, seed)
        if random:
            torch.set_rng_state(random[number])
        value = loss(model(x.to(device)), y.to(device))
        if weight:  # what counts nothing may have no loss, and is NaN
            (value if weight == 1 else value * weight).backward()
        recorder.batch(indices, seed, None if len(step.batches or ()) == 1 and weight == 1 else weight)
    for name, parameter in model.named_parameters():
        if name in step.without_gradient:
            parameter.grad = None
        elif parameter.grad is not None and step.gradient_scale != 1:
            parameter.grad.mul_(step.gradient_scale)
    for group in optimizer.param_groups[len(step.groups) :]:
        for parameter in group["params"]:
            parameter.grad = None
    if step.gradient_scale != 1:
        recorder.gradient_scale(step.gradient_scale)
    optimizer.step()


def _compare(trajectory: Trajectory, index: int, model: nn.Module, tolerance: float) -> None:
    found, kept = trajectory.layout.flatten(named_tensors(model)), trajectory.state(index)
    off = float((found - kept).abs().max())
    if not off <= tolerance * float(kept.abs().max()):
        raise PrunekitError(
            f"{trajectory.folder}: replayed weights differ from state {index} by {off:.3g}; loss, data, optimizer or model are "
            "not those that were recorded"
        )
