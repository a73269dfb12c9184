"""Scores that follow from a weight and sums over its layer's inputs; of what has none, magnitudes where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from prunekit.criteria.evidence import CriterionResult, Evidence
from prunekit.criteria.layer_inputs import Layer, add_up, from_rows, layers_with_inputs, refuse_unfit, summing, to_rows, unreached
from prunekit.structure.roles import weight_roles

HELD = 2**30
"""Bytes of sums that are held at a time; layers beyond that wait for another pass over the samples."""


def scored_by_inputs(
    evidence: Evidence,
    what: str,
    each: Callable[[Tensor], Tensor],
    metric: Callable[[Tensor, Tensor], Tensor],
    size: int,
    power: int,
) -> CriterionResult:
    """Importance of every prunable weight, at the weights to score.

    Args:
        what: the criterion's name, for messages.
        each: rows ``(groups, rows, d)`` -> what is summed over them, ``(groups, d, ...)``.
        metric: weight rows ``(groups, outputs / groups, d)`` and that sum, both float64 on the CPU -> importance of the rows.
        size: sums have ``groups × d^size`` numbers.
        power: importance grows with this power of a weight; see ``_by_magnitude``.

    Raises:
        PrunekitError: parameters whose layers' inputs cannot be looked at, or none of which was reached; names all of them.
            With ``evidence.skip_unfit`` only where that is every one.
    """
    model, device, run = evidence.passing()
    layers, unfit = layers_with_inputs(model, evidence.prunable)
    if unfit and (not evidence.skip_unfit or not layers):
        refuse_unfit(unfit, what)
    weights, importance = evidence.weights(), {}
    reached: set[str] = set()
    for some in portions(layers, size):
        with evidence.shared() as samples:
            with summing(some, each) as sums:
                run(samples)
            add_up(sums, device)
        reached |= set(sums)
        for name in list(sums):
            layer, weight = some[name][0], weights[name].cpu()
            found = metric(to_rows(layer, weight).double(), sums.pop(name).cpu())
            importance[name] = from_rows(layer, found).to(weight.dtype)
    return with_others_by_magnitude(evidence, importance, unfit | unreached(reached, layers), what, power)


def with_others_by_magnitude(
    evidence: Evidence, importance: dict[str, Tensor], unfit: Mapping[str, str], what: str, power: int
) -> CriterionResult:
    """What was scored by inputs, and ``unfit`` by magnitude where that is asked for; see ``scored_by_inputs``."""
    weights = evidence.weights()
    if unfit and (not evidence.skip_unfit or not importance):
        refuse_unfit(unfit, what)
    if not unfit:
        return CriterionResult({name: importance[name] for name in evidence.prunable})
    scale = _scale({name: weights[name].cpu() for name in importance}, importance, power)
    importance |= {name: (weights[name].cpu().double().abs() ** power * scale).to(weights[name].dtype) for name in unfit}
    return CriterionResult(
        {name: importance[name] for name in evidence.prunable},
        findings={"by_magnitude": {"parameters": {n: unfit[n] for n in evidence.prunable if n in unfit}, "scale": scale}},
    )


def axes_that_read(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Weight -> axis of its layer's inputs; an embedding reads nothing, unless a linear layer shares its weight."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    roles = weight_roles(model)
    found = {}
    for name in names:
        owners = [modules[other.rpartition(".")[0]] for other, tensor in parameters.items() if tensor is parameters.get(name)]
        if name in roles and not all(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners):
            found[name] = roles[name].input
    return found


def portions(layers: Mapping[str, list[Layer]], size: int) -> Iterator[dict[str, list[Layer]]]:
    """The layers in turn, as many at a time as ``HELD`` has room for."""
    some: dict[str, list[Layer]] = {}
    held = 0
    for name, holding in layers.items():
        groups, _, d = to_rows(holding[0], holding[0].weight).shape  # type: ignore[arg-type]
        needed = 8 * groups * d**size
        if some and held + needed > HELD:
            yield some
            some, held = {}, 0
        some[name] = holding
        held += needed
    if some:
        yield some


def _scale(weights: Mapping[str, Tensor], importance: Mapping[str, Tensor], power: int) -> float:
    """What makes ``|θ|^power`` comparable: the mean importance of the weights that have one, over their mean ``|θ|^power``.

    A weight without inputs counts as if its inputs were as large as those of others.
    """
    known = sum(float(values.double().sum()) for values in importance.values())
    plain = sum(float((weights[name].double().abs() ** power).sum()) for name in importance)
    return known / plain if known > 0 and plain > 0 else 1.0
