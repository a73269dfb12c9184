"""Kept weights that make up for removed ones: least squares on every layer's outputs, then on the network's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply.gauss_newton import Distance, Part, descend
from prunekit.apply.layerwise import layerwise
from prunekit.apply.masks import apply_masks, what_goes
from prunekit.data import Samples, learn_and_accept
from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.structure.stand_ins import stand_in
from prunekit.task import Task
from prunekit.task.evaluation import mixing
from prunekit.task.settle import settle
from prunekit.trajectory import Layout
from prunekit.trajectory.copies import copied
from prunekit.trajectory.layout import fixed_state

LENGTHS = (0.25, 0.5, 0.75, 1.0)
WIDE = 2**16
"""Numbers that a sample's outputs may have for steps on the network's outputs; a window of text has a vocabulary's a token."""


def compensate(
    model: nn.Module,
    plan: Plan | Mapping[str, Tensor],
    batches: Any,
    *,
    accept: Any = None,
    rounds: int = 3,
    steps: int = 10,
    damping: float = 0.1,
    seed: int = 0,
    task: str | Task | None = None,
) -> nn.Module:
    """A masked copy of ``model`` whose kept parameters bring its outputs back to ``model``'s, never further away on ``accept``.

    First the kept weights of every layer keep that layer's outputs (``layerwise``), as far along, from the masked weights to
    those, as helps the *network's* outputs. That is much for a mask that was made layer by layer or by size, and little or
    nothing for a refined one, which keeps the network's outputs without keeping any layer's: pulling one layer back breaks what
    the others rely on. So then all kept parameters together take ``rounds`` Gauss-Newton steps on the network's outputs
    (``prunekit.apply.gauss_newton``): Optimal Brain Surgeon's problem (Hassibi & Stork 1992) for a whole set and to second order
    in the outputs, solved without its matrix. Both are computed on ``batches`` and judged on ``accept`` by the task's divergence
    from the dense model; labels say no more than which places count.

    Where a sample's outputs are more than 65,536 numbers, as a window of text's are, Gauss-Newton's products would take hours:
    layers alone are made up for then, which is said.

    Costs a factorisation an output and two forward passes a layer for the first, and for the second, a round, ``steps`` products
    (one derivative forward, one backward: five forward passes of ``batches``) and three gradients: with the defaults about 60
    gradients of every sample.

    Args:
        model: the weights that ``plan`` was made for; left as it is. It is computed with on its own device.
        plan: a plan, or masks by parameter or buffer name (True stays). Of a plan, prunable weights that lose nothing may
            change too, and the copy has its stand-ins (``Plan.stand_ins``).
        batches: samples ``(inputs, labels)`` to compute from; a data set, a ``DataLoader``, or batches.
        accept: samples of their own to judge on; None sets every fourth of ``batches`` apart for that.
        rounds: of Gauss-Newton; 0 leaves the layers' least squares alone.
        steps: of conjugate gradients a round.
        damping: of the first round, over the mean curvature.
        seed: of the draws that the preconditioner is estimated from.
        task: what the model is for, a name from ``prunekit.task.TASKS`` or a ``Task``; None where samples leave no doubt.

    Raises:
        ArtifactError: a mask names no parameter or buffer of the model, or has another shape.
        UsageError: an option is out of range, or there are no samples for one of the parts.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, compensate, make_plan, masked, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> x = torch.randn(64, 4)
        >>> better = compensate(model, plan, [(x, model(x).argmax(1))])
        >>> before, after = ((m(x) - model(x)).square().mean() for m in (masked(model, plan), better))
        >>> bool(after < before)
        True
    """
    for name, value, least in (("rounds", rounds, 0), ("steps", steps, 1), ("damping", damping, 0)):
        if value < least:
            raise UsageError(f"compensate: {name} is {value}; it must be at least {least}")
    kind, samples = settle(model, batches, task)
    if samples is None:
        raise UsageError("compensate needs samples to learn from and samples to accept on; it got none")
    given = None if accept is None else Samples.of(accept, kind.batch)
    learn, judged = learn_and_accept(samples, given, torch.arange(len(samples)) % 4 == 1, "compensate")
    result = copied(model)
    masks, stand_ins = what_goes(model, plan)
    apply_masks(result, masks)
    stand_in(result, stand_ins)
    fewest = min(len(learn), len(judged))
    with ranks.apart() if fewest < ranks.size() or mixing(model, samples, kind) else nullcontext():
        theta = _compensated(model, result, plan, masks, learn, judged, kind, rounds, steps, damping, seed)
    layout, final = Layout.of(model), dict(result.named_parameters())
    found = layout.views(ranks.same({"": theta})[""])
    with torch.no_grad():
        for entry in layout.parameters:
            final[entry.name].copy_(found[entry.name])
    return result


def _compensated(
    model: nn.Module,
    result: nn.Module,
    plan: Plan | Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    learn: Samples,
    judged: Samples,
    kind: Task,
    rounds: int,
    steps: int,
    damping: float,
    seed: int,
) -> Tensor:
    """The kept parameters, flat ``(P,)``; ``result`` is the masked model."""
    device = next(model.parameters()).device
    solved, layout = layerwise(model, plan, learn, task=kind), Layout.of(model)
    rows = ModelFunction(solved, layout, fixed_state(solved, layout), lambda out, _: out.reshape(len(out), -1), device, task=kind)
    distance = Distance(rows, kind, copied(model).eval())
    judging = distance.referenced(judged)
    theta = _along(distance, layout.state(result), layout.state(solved), judging)
    if not rounds or not distance.value(theta, judging) > 0:
        return theta
    few = distance.referenced(learn.first(ranks.size()))
    if (wide := ranks.from_first(lambda: _width(distance, theta, few))) > WIDE:
        warnings.warn(f"compensate: layer by layer only, since a sample's outputs are {wide:,} numbers", stacklevel=3)
        return theta
    free = _free(layout, masks, theta)
    return _descended(distance, theta, free, distance.referenced(learn), judging, rounds, steps, damping, seed)


def _width(distance: Distance, theta: Tensor, few: Part) -> int:
    """Numbers in one sample's outputs."""
    x, y = few.batches[0]
    return int(distance.outputs(theta, x, y).shape[1])


def _along(distance: Distance, masked: Tensor, solved: Tensor, judging: Part) -> Tensor:
    """The point from ``masked`` to ``solved`` that is best on ``judging``; of equals the nearest to ``masked``."""
    points = [masked, *(torch.lerp(masked, solved, length) for length in LENGTHS[:-1]), solved]
    return min(points, key=lambda theta: distance.value(theta, judging))


def _descended(
    distance: Distance,
    theta: Tensor,
    free: Tensor,
    learn: Part,
    judging: Part,
    rounds: int,
    steps: int,
    damping: float,
    seed: int,
) -> Tensor:
    """``theta`` after the Gauss-Newton rounds; where the model has no derivatives for them, as it is, which is said."""
    if lacking := ranks.from_first(lambda: _lacking(distance, theta, learn)):
        warnings.warn(
            f"compensate: layer by layer only, since this model cannot be differentiated forward ({lacking})", stacklevel=3
        )
        return theta
    with Bar("compensate", rounds) as bar:
        made = descend(distance, theta, free, learn, judging, rounds=rounds, steps=steps, damping=damping, seed=seed)
        for better, value in made:
            theta = better
            bar.describe(f"compensate: divergence {value:.4g}")
            bar.advance()
    return theta


def _lacking(distance: Distance, theta: Tensor, learn: Part) -> str:
    """What torch says of a derivative that the model has none of, tried on two samples; "" where it has all."""
    few = distance.referenced(learn.batches.source.first(2))
    try:
        x, y = few.batches[0]
        slope = distance.outputs.gradient(theta, x, y, torch.randn_like(distance.outputs(theta, x, y)))[1]
        if not slope.any():
            return "its outputs carry no gradient"
        distance.product(theta, theta, few)
        distance.diagonal(theta, few, distance.engine(theta, few), 0)
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    return ""


def _free(layout: Layout, masks: Mapping[str, Tensor], theta: Tensor) -> Tensor:
    """1 for parameters that stay, 0 for what the masks remove and for buffers, ``(P,)``."""
    free = torch.zeros_like(theta)
    for entry in layout.parameters:
        kept = masks.get(entry.name)
        free[entry.span] = 1 if kept is None else kept.reshape(-1).bool().to(free)
    return free
