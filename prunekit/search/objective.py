"""What a repair lowers: a divergence from the dense model, learnt from some samples and accepted on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.criteria.evidence import Loss
from prunekit.errors import PrunekitError, UsageError, nearest
from prunekit.kernel import ModelFunction, Target, divergence, from_loss, mean_value
from prunekit.kernel.blame import Batches
from prunekit.trajectory import Layout
from prunekit.trajectory.layout import fixed_state

OBJECTIVES = ("kl", "loss")
SAMPLES_AT_A_TIME = 256


@dataclass(frozen=True)
class Objective:
    """``J(θ)``, a mean over samples, to be lowered.

    Attributes:
        function: the model with J's own target.
        theta: the dense weights, ``(P,)``.
        learn, accept: disjoint parts of the samples, with what ``function`` takes as labels.
        labelled: the part to learn from with its true labels.
        ranking: the model with the target whose gradients say how important a kept unit is.
    """

    function: ModelFunction
    theta: Tensor
    learn: Batches
    accept: Batches
    labelled: Batches
    ranking: ModelFunction

    def on_learn(self, factors: Tensor) -> float:
        return mean_value(self.function, self.theta * factors, self.learn)

    def on_accept(self, factors: Tensor) -> float:
        return mean_value(self.function, self.theta * factors, self.accept)


def make_objective(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    target: str | Target,
    ranking: str | Target,
    *,
    loss: Loss = F.cross_entropy,
    accept: Iterable[tuple[Tensor, Tensor]] | None = None,
    accept_share: float = 0.25,
    seed: int = 0,
    reference: nn.Module | None = None,
) -> Objective:
    """Splits the samples and runs the dense model once.

    Args:
        target: ``"kl"`` (to the dense model's outputs; labels are not looked at), ``"loss"`` on the labels, or a
            function ``(outputs, labels) -> (samples, targets)`` whose sum over targets is lowered.
        ranking: a target; a name from ``prunekit.kernel.TARGETS`` or a function. ``"loss"`` means ``loss``.
        loss: mean loss.
        accept: samples that masks are accepted on; None takes ``accept_share`` of ``batches``, in (0, 1), for that.
        reference: whose outputs are to be stayed close to; None for those of ``model`` itself.

    Raises:
        UsageError: unknown target, a share out of range, no samples for one of the parts, or a reference of other tensors.
        PrunekitError: J is not finite for the dense model.
    """
    if isinstance(target, str) and target not in OBJECTIVES:
        raise UsageError(f"refine: target {target!r} does not exist; {nearest(target, list(OBJECTIVES))}, or a function")
    if not 0 < accept_share < 1:
        raise UsageError(f"refine: the share of samples to accept on is {accept_share}; it must be above 0 and below 1")
    device = next(model.parameters()).device
    layout = Layout.of(model)
    fixed = fixed_state(model, layout)
    theta = _flat(model, layout)
    close_to = theta if reference is None else _flat(reference, layout).to(device)
    given = [(x.to(device), y.to(device)) for x, y in batches]
    if accept is None:
        learn, judged = _split(given, accept_share, seed)
    else:
        learn, judged = _bounded(given), _bounded([(x.to(device), y.to(device)) for x, y in accept])
        if not learn or not judged:
            raise UsageError("refine needs samples to learn from and samples to accept on; one of them has none")
    labelled = learn
    per_sample = from_loss(loss)
    if target == "kl":
        outputs = ModelFunction(model, layout, fixed, lambda out, labels: out, device)
        learn, judged = ([(x, _log_probs(outputs, close_to, x, y)) for x, y in part] for part in (learn, judged))
        function = ModelFunction(model, layout, fixed, divergence, device)
    else:
        function = ModelFunction(model, layout, fixed, per_sample if isinstance(target, str) else target, device)
    ranked = ModelFunction(model, layout, fixed, per_sample if ranking == "loss" else ranking, device)
    made = Objective(function, theta, learn, judged, labelled, ranked)
    at_dense = made.on_learn(torch.ones_like(theta))
    if not torch.tensor(at_dense).isfinite():
        raise PrunekitError(f"refine: the target is {at_dense} for the dense model")
    return made


def _flat(model: nn.Module, layout: Layout) -> Tensor:
    if Layout.of(model) != layout:
        raise UsageError("refine: the reference's tensors are not those of the model")
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return layout.flatten({name: tensor.detach() for name, tensor in named.items()})


@torch.no_grad()
def _log_probs(function: ModelFunction, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.log_softmax(function(theta, x, y), -1)


def _split(batches: Sequence[tuple[Tensor, Tensor]], share: float, seed: int) -> tuple[Batches, Batches]:
    """Learn and accept parts, at most ``SAMPLES_AT_A_TIME`` in a batch."""
    total = sum(len(x) for x, _ in batches)
    if total < 2:
        raise UsageError(f"refine needs two samples at least, one to learn from and one to accept on; it got {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    accepted = torch.zeros(total, dtype=torch.bool)
    accepted[order[: min(max(1, round(share * total)), total - 1)]] = True
    parts: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
    begin = 0
    for x, y in batches:
        here = accepted[begin : begin + len(x)].to(x.device)
        begin += len(x)
        for part, where in zip(parts, (~here, here), strict=True):
            part.append((x[where], y[where]))
    return _bounded(parts[0]), _bounded(parts[1])


def _bounded(batches: Batches) -> Batches:
    """At most ``SAMPLES_AT_A_TIME`` in a batch, and none that is empty."""
    size = SAMPLES_AT_A_TIME
    return [part for x, y in batches if len(x) for part in zip(x.split(size), y.split(size), strict=True)]
