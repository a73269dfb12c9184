"""Pruning by layers: each loses what its own outputs miss least on calibration samples, one block after the other.

Beside scoring and planning, which rank weights of the whole model, a layer-wise method looks at one layer at a time, finds which
of its weights go together with new values for the others, and hands the pruned layer's outputs on. It needs one block of the
model at a time, and seconds. ``prunekit.apply.layerwise`` is another thing: new weights for masks that are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.criteria import model_digest
from prunekit.criteria.layer_inputs import TRANSPOSED, Layer, from_rows, layers_with_inputs, to_rows
from prunekit.data import Samples
from prunekit.errors import NonFiniteError, PrunekitError, UsageError, nearest
from prunekit.layerwise import admm, magnitude, sparsegpt, wanda
from prunekit.layerwise.amount import WITHIN, Amount
from prunekit.layerwise.method import Method, Problem, Solved
from prunekit.layerwise.moments import precision, summed
from prunekit.layerwise.passing import Part, Passing
from prunekit.plan import Plan
from prunekit.plan.plan import OUTPUTS
from prunekit.progress import Bar
from prunekit.structure import asked_sparsity, pattern_of
from prunekit.structure.prunable import prunable_parameters
from prunekit.structure.roles import weight_roles
from prunekit.task import Task, get_task
from prunekit.trajectory import Layout
from prunekit.trajectory.bare import bare
from prunekit.trajectory.copies import copied

METHODS: dict[str, Method] = {
    "magnitude": magnitude.METHOD, "wanda": wanda.METHOD, "sparsegpt": sparsegpt.METHOD, "admm": admm.METHOD,
}  # fmt: skip
"""To add a method, write a file with a ``METHOD`` and enter it here."""

ACTIVATIONS = 2**31
"""Bytes of activations that are held unless told."""


@torch.no_grad()
def prune_layerwise(
    model: nn.Module,
    batches: Any,
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    structure: str = "unstructured",
    within: str | None = None,
    samples: int | None = None,
    damping: float = 0.01,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    activations: int = ACTIVATIONS,
    device: torch.device | str | None = None,
    task: str | Task | None = None,
) -> tuple[Plan, nn.Module]:
    """Prunes every layer of a model's blocks by the inputs that the blocks pruned before it send.

    Linear layers and convolutions lose weights. Where the model is a row of blocks, as transformers are, those outside of it
    (embeddings, the output layer) stay whole, as in the methods' papers; other models lose in all layers. What stays whole is
    named in the plan's ``provenance["refused"]``, with the reason. Every layer loses the same share.

    At a time there are: one block on the device; of the block's layers, where inputs differ, a ``d × d`` matrix (``wanda``: ``d``
    numbers); the inputs of one block for all samples; and the copy of the model that is returned.

    Args:
        model: the trained model; left as it is.
        batches: calibration samples as of ``prunekit.score``; labels are not looked at.
        method: a key of ``prunekit.layerwise.METHODS``.
        sparsity: share that goes of every layer, in [0, 1); N:M says it itself (None).
        structure: ``unstructured`` or N:M, such as ``2:4``.
        within: ``rows``: every output loses the same share; ``layer``: a layer's weights compete with one another. None: as the
            method's paper does. N:M is within rows.
        samples: at most so many of ``batches``, the first ones.
        damping: of the methods that change weights: this share of the mean of ``Σ x²`` is added to each input's, which holds
            weights where the samples say little.
        ignore, include: patterns of parameters, as of ``prunekit.score``.
        activations: bytes of hidden states to hold, where the model has blocks.
        device: where blocks compute, one at a time; the model's own where None.
        task: says what of a batch is the model's input.

    Returns:
        the plan, of masks, whose ``provenance["criterion"]`` is the method; and the pruned model with its new weights. Of
        ``magnitude`` and ``wanda`` ``prune(model, plan)`` gives the same.

    Raises:
        UsageError: an unknown method or structure, a value out of range, no samples, no layer, or activations beyond their bytes.
        NonFiniteError: what reaches a layer is NaN or Inf.
        PrunekitError: with ``damping`` too small, a layer's inputs cannot be told apart.

    Example:
        >>> import torch
        >>> from prunekit import prune_layerwise
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> plan, small = prune_layerwise(model, [(x, None)], method="admm", sparsity=0.5)
        >>> plan.sparsity()["prunable"], int((small[0].weight == 0).sum()), small(x).shape
        (0.5, 16, torch.Size([64, 2]))
    """
    chosen = get_method(method)
    amount = amount_of(structure, sparsity, within, chosen)
    if not 0 <= damping < float("inf"):
        raise UsageError(f"damping is {damping}; it must be at least 0")
    if activations < 1 or (samples is not None and samples < 1):
        raise UsageError(f"activations is {activations} bytes and samples {samples}; each must be at least 1")
    model = bare(model)
    data = Samples.of(batches, get_task(task).batch).first(samples)
    if not len(data):
        raise UsageError("prune_layerwise needs calibration samples; it got none")
    result = copied(model)
    ignored, included = ([given] if isinstance(given, str) else list(given) for given in (ignore, include))
    prunable = prunable_parameters(result, Layout.of(result), ignored, included)
    layers, refused = _layers(result, prunable, amount)
    modes = {module: module.training for module in result.modules()}
    result.eval()
    where = next(result.parameters()).device if device is None else torch.device(device)
    passing = Passing(result, layers, data, where, activations)
    refused |= {name: "lies outside the blocks, which alone are pruned" for name in layers if name not in passing.layers}
    keep: dict[str, Tensor] = {}
    by_magnitude: list[str] = []
    with Bar(f"prune: {method}", len(passing.layers)) as bar:
        for part in passing.parts():
            for name, solved in _solved(part, chosen, amount, damping, by_magnitude):
                part.layers[name][0].weight.copy_(solved.weight)  # type: ignore[operator]
                keep[name] = solved.keep.cpu()
                bar.advance()
    for module, training in modes.items():
        module.training = training
    facts = {
        "within": amount.within if amount.pattern is None else structure,
        "samples": len(data),
        "data": data.digest(),
        "changes": chosen.changes,
        **({"damping": damping} if chosen.changes else {}),
        **({"by_magnitude": by_magnitude} if by_magnitude else {}),
    }
    return _plan(model, method, structure, amount, {n: keep[n] for n in layers if n in keep}, refused, facts), result


def get_method(name: str) -> Method:
    """Looks a method up.

    Raises:
        UsageError: unknown; near names are offered.
    """
    if name not in METHODS:
        raise UsageError(f"layer-wise method {name!r} does not exist; {nearest(name, list(METHODS))}")
    return METHODS[name]


def amount_of(structure: str, sparsity: float | None, within: str | None, method: Method) -> Amount:
    """How much every layer loses.

    Raises:
        UsageError: no layer-wise method does that.
    """
    if within is not None and within not in WITHIN:
        raise UsageError(f"within is {within!r}; {nearest(within, list(WITHIN))}")
    pattern = pattern_of(structure)
    if structure != "unstructured" and (pattern is None or pattern.kind != "nm"):
        raise UsageError(
            f"structure {structure!r}: layer-wise methods remove single weights; take unstructured or N:M, such as 2:4"
        )
    if pattern is not None and within == "layer":
        raise UsageError(f"within is 'layer', and {structure} keeps as much in every row; leave within out")
    return Amount(asked_sparsity(structure, sparsity), within or method.within, pattern)


def _layers(model: nn.Module, prunable: list[str], amount: Amount) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The layers of the prunable parameters; and what has none, and why."""
    layers, unfit = layers_with_inputs(model, prunable)
    refused = {name: f"{why} is no linear layer or convolution" for name, why in unfit.items()}
    if amount.pattern is not None:
        turned = [name for name, holding in layers.items() if isinstance(holding[0], TRANSPOSED)]
        refused |= dict.fromkeys(turned, "N:M does not run along a transposed convolution's inputs")
        layers = {name: holding for name, holding in layers.items() if name not in turned}
    if not layers:
        raise UsageError(f"no layer to prune: {'; '.join(f'{name}: {why}' for name, why in refused.items())}")
    return layers, refused


def _solved(part: Part, method: Method, amount: Amount, damping: float, by_magnitude: list[str]) -> Iterable[tuple[str, Solved]]:
    """Every layer of a part, solved, in its weight's shape; layers that no input reaches join ``by_magnitude``."""
    sums = summed(part.layers, method.moments, part.batches)
    for name, (layer, *_) in part.layers.items():
        weight = to_rows(layer, layer.weight)  # type: ignore[arg-type]
        weight = weight.to(precision(weight))
        reached = name in sums or method.moments is None
        if not reached:
            by_magnitude.append(name)
        problem = Problem(weight, sums.get(name, weight.new_empty(0)), damping)
        if not bool(problem.moments.isfinite().all()):
            raise NonFiniteError(f"{name}: its layer's inputs are NaN or Inf for some of the samples; look at the data")
        try:
            found = (method if reached else magnitude.METHOD).solve(problem, amount)
        except PrunekitError as error:
            raise PrunekitError(f"{name}: {error}") from None
        if not bool(found.weight.isfinite().all()):
            raise NonFiniteError(f"{name}: its weights would be NaN or Inf; damping is {damping:g}, give a larger one")
        yield name, Solved(from_rows(layer, found.weight), from_rows(layer, found.keep).contiguous())


def _plan(
    model: nn.Module,
    method: str,
    structure: str,
    amount: Amount,
    keep: dict[str, Tensor],
    refused: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Plan:
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | buffers
    roles = weight_roles(model)
    turned = {name: roles[name].output for name in keep if name in roles and roles[name].output}
    provenance = {
        "criterion": method,
        "model": model_digest(model),
        "trajectory": None,
        "allocation": "rows" if amount.within == "rows" and amount.pattern is None else "uniform",
        "sparsity": amount.sparsity,
        "prunable": list(keep),
        "buffers": list(buffers),
        "layerwise": dict(facts),
        **({OUTPUTS: turned} if turned and amount.pattern is not None else {}),
        **({"refused": dict(refused)} if refused else {}),
    }
    return Plan(structure, keep, {}, shapes, provenance)
