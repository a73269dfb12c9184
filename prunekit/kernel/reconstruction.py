"""The model's outputs rebuilt from its path, with a certificate: ``f(θ_0) + Σ_s ∫ ∇f · D_s = f(θ_N)``.

Forward mode gives ``∇f(θ) · D`` for all samples and outputs at once, so no Jacobian is formed. ``f`` at both ends
of a piece gives its exact value, so every piece carries its own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit import ranks
from prunekit.batch import Inputs, Labels, size, take, to
from prunekit.kernel.bisection import bisect
from prunekit.kernel.function import ModelFunction
from prunekit.kernel.quadrature import get_rule
from prunekit.kernel.stepwise import layers_of
from prunekit.trajectory.trajectory import Segment


@dataclass(frozen=True)
class Reconstruction:
    """Values are ``(samples, targets)``.

    ``start``: f at the path's beginning; ``rebuilt``: start plus the integrals; ``model``: f at its end;
    ``residuals`` ``(pieces,)``: mean absolute error of each piece over samples and targets (the certificate);
    ``evaluations``: directional derivatives taken, in samples, those of rejected midpoints included.
    """

    start: Tensor
    rebuilt: Tensor
    model: Tensor
    residuals: Tensor
    evaluations: int

    @property
    def error(self) -> Tensor:
        """``|rebuilt - model|``, ``(samples, targets)``."""
        return (self.rebuilt - self.model).abs()


def reconstruct(
    function: ModelFunction,
    segments: Iterable[Segment],
    x: Inputs,
    y: Labels,
    *,
    tolerance: float | None = 1e-3,
    nodes: int = 1,
    rule: str = "midpoint",
    jumps: float | None = None,
    tick: Callable[[int], None] = lambda amount: None,
    within: Callable[[float], None] = lambda amount: None,
) -> Reconstruction:
    """Rebuilds ``f(x; θ_N)`` along the path.

    Args:
        tolerance: halve a piece, up to 12 times, until every interval is off by less, per sample;
            None takes the fixed ``rule`` with ``nodes`` instead.
        jumps: tolerance, beside a fixed rule, of pieces in which weights were set.
        tick: called once per piece; ``within``: called with the samples' share of a piece that is done.
    """
    with _own(x, y) as (own_x, own_y):
        share = size(x) / size(own_x)
        each = _reconstructed(
            function, segments, to(own_x, function.device), to(own_y, function.device), tolerance, nodes, rule, jumps, tick,
            lambda amount: within(amount * share),
        )  # fmt: skip
        residuals = each.residuals * size(own_x)
        told = torch.tensor([size(own_x), each.evaluations], dtype=torch.float64)
        ranks.add_up([residuals, told])
        samples, evaluations = told.tolist()
        start, rebuilt, value = map(ranks.rows, (each.start, each.rebuilt, each.model))
        return Reconstruction(start, rebuilt, value, residuals / samples, int(evaluations))


@contextmanager
def _own(x: Inputs, y: Labels) -> Iterator[tuple[Inputs, Labels]]:
    """A rank's stretch of the samples, whose rows are put together inside; of fewer samples than ranks each has all, alone."""
    count = size(x)
    with ranks.apart() if count < ranks.size() else nullcontext():
        if ranks.size() > 1:
            part = ranks.stretch(count)
            own = slice(part.start, part.stop)
            x, y = take(x, own), take(y, own, count)
        yield x, y


def _reconstructed(
    function: ModelFunction,
    segments: Iterable[Segment],
    x: Inputs,
    y: Labels,
    tolerance: float | None,
    nodes: int,
    rule: str,
    jumps: float | None,
    tick: Callable[[int], None],
    within: Callable[[float], None],
) -> Reconstruction:
    """``reconstruct`` of a rank's own samples."""
    start = rebuilt = value = None
    residuals: list[Tensor] = []
    evaluations = 0

    def spend(samples: int) -> None:
        nonlocal evaluations
        evaluations += samples

    quadrature = get_rule(rule, nodes)
    for segment in segments:
        theta, end = segment.start.to(function.device), segment.end.to(function.device)
        if value is None or rebuilt is None:
            with torch.no_grad():
                start = value = function(theta, x, y)
            rebuilt = start.double()
        with torch.no_grad():
            after = function(end, x, y)
        allowed = jumps if tolerance is None and segment.jump else tolerance
        if allowed is None:
            change = torch.zeros_like(rebuilt)
            for node, weight in quadrature:
                slope = function.directional(torch.lerp(theta, end, node), end - theta, x, y)[1]
                change += weight * slope.double()
            spend(len(quadrature) * size(x))
        else:
            change = torch.zeros_like(rebuilt)
            for piece in bisect(function, theta, end, x, y, value, after, allowed, spend):
                change.index_add_(0, piece.who, (piece.slope * piece.weight).double())
                within(len(piece.who) * piece.weight)
        residuals.append((change - (after.double() - value.double())).abs().mean())
        rebuilt, value = rebuilt + change, after
        tick(1)
    if start is None or rebuilt is None or value is None:
        raise ValueError("a path without pieces has nothing to rebuild")
    return Reconstruction(start, rebuilt.to(start.dtype), value, torch.stack(residuals), evaluations)


def masked_machine(
    function: ModelFunction,
    segments: Iterable[Segment],
    mask: Tensor,
    x: Inputs,
    y: Labels,
    *,
    nodes: int = 1,
    rule: str = "midpoint",
    tick: Callable[[int], None] = lambda amount: None,
) -> Tensor:
    """The kernel machine of the kept weights alone: ``f(x; θ_0) + Σ_{i kept} (ψ_i + ψ_i^reg)(x)``.

    A cheap reading that never runs the pruned model; how well it predicts it is to be measured, not assumed.

    Args:
        mask: flat ``(P,)``, 1 for kept coordinates.

    Returns:
        ``(samples, targets)``.
    """
    mask = mask.to(function.device)
    total = None
    with _own(x, y) as own:
        x, y = (to(part, function.device) for part in own)
        for segment in segments:
            theta, end = segment.start.to(function.device), segment.end.to(function.device)
            if total is None:
                with torch.no_grad():
                    total = function(theta, x, y).double()
            for node, weight in get_rule(rule, nodes):
                slope = function.directional(torch.lerp(theta, end, node), (end - theta) * mask, x, y)[1]
                total += weight * slope.double()
            tick(1)
        if total is None:
            raise ValueError("a path without pieces has no kernel machine")
        return ranks.rows(total.float())


def shares_by_layer(function: ModelFunction, segment: Segment, x: Inputs, y: Labels, nodes: int = 32) -> dict[str, Tensor]:
    """How much of a piece's change came through each layer: ``layer name -> (samples, targets)``.

    They sum to the change of ``f`` up to quadrature. Layers that the piece does not move are left out.
    """
    with _own(x, y) as own:
        x, y = (to(part, function.device) for part in own)
        return {layer: ranks.rows(share) for layer, share in _shares(function, segment, x, y, nodes).items()}


def _shares(function: ModelFunction, segment: Segment, x: Inputs, y: Labels, nodes: int) -> dict[str, Tensor]:
    """``shares_by_layer`` of a rank's own samples."""
    theta, end = segment.start.to(function.device), segment.end.to(function.device)
    with torch.no_grad():
        samples, targets = function(theta, x, y).shape
    directions: dict[str, Tensor] = {}
    for entry in function.layout:
        layer = entry.name.rpartition(".")[0] or entry.name
        directions.setdefault(layer, torch.zeros_like(theta))[entry.span] = (end - theta)[entry.span]
    directions = {layer: direction for layer, direction in directions.items() if direction.any()}
    if samples * targets < len(directions):  # a backward pass a number gives all layers at once
        return _shares_by_gradients(function, theta, end, list(directions), x, y, targets, nodes)
    shares: dict[str, Tensor] = {}
    for layer, direction in directions.items():
        slopes = [
            weight * function.directional(torch.lerp(theta, end, node), direction, x, y)[1]
            for node, weight in get_rule("midpoint", nodes)
        ]
        shares[layer] = torch.stack(slopes).sum(0)
    return shares


def _shares_by_gradients(
    function: ModelFunction, theta: Tensor, end: Tensor, layers: list[str], x: Inputs, y: Labels, targets: int, nodes: int
) -> dict[str, Tensor]:
    """``shares_by_layer`` of few samples and targets, by reverse mode."""
    samples = size(x)
    spans = layers_of(function.layout)
    shares = {layer: theta.new_zeros(samples, targets) for layer in layers}
    for sample in range(samples):
        alone, label = take(x, slice(sample, sample + 1)), take(y, slice(sample, sample + 1), samples)
        for node, weight in get_rule("midpoint", nodes):

            def add(target: int, gradient: Tensor, sample: int = sample, weight: float = weight) -> None:
                moved = weight * gradient * (end - theta)
                for layer in layers:
                    shares[layer][sample, target] += torch.stack([moved[span].sum() for span in spans[layer]]).sum()

            function.gradients(torch.lerp(theta, end, node), alone, label, add)
    return shares
