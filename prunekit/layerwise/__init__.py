"""Pruning by layers: each loses what its own outputs miss least on calibration samples, one block after the other.

Beside scoring and planning, which rank weights of the whole model, a layer-wise method looks at one layer at a time, finds which
of its weights go together with new values for the others, and hands the pruned layer's outputs on. It needs one block of the
model at a time, and seconds. ``prunekit.apply.layerwise`` is another thing: new weights for masks that are given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.apply import check_made_for
from prunekit.blocks import InMemory
from prunekit.criteria import model_digest
from prunekit.data import Samples
from prunekit.errors import UsageError
from prunekit.layerwise.amount import Amount
from prunekit.layerwise.method import Method, Problem, Solved
from prunekit.layerwise.pruning import ACTIVATIONS, METHODS, Asked, Pruning, amount_of, get_method
from prunekit.plan import Plan
from prunekit.plan.plan import OUTPUTS
from prunekit.structure.roles import weight_roles
from prunekit.task import Task, get_task
from prunekit.task.evaluation import mixing
from prunekit.trajectory.bare import bare
from prunekit.trajectory.copies import copied

__all__ = [
    "ACTIVATIONS", "METHODS", "Amount", "Asked", "Method", "Problem", "Pruning", "Solved", "amount_of", "get_method",
    "prune_layerwise",
]  # fmt: skip


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
    shares: Plan | None = None,
) -> tuple[Plan, nn.Module]:
    """Prunes every layer of a model's blocks by the inputs that the blocks pruned before it send.

    Linear layers and convolutions lose weights. Where the model is a row of blocks, as transformers are, those outside of it
    (embeddings, the output layer) stay whole, as in the methods' papers; other models lose in all layers. What stays whole is
    named in the plan's ``provenance["refused"]``, with the reason. Every layer loses the same share, or that of
    ``shares``.

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
        shares: a plan of single weights: every layer loses the share that it loses there, and no more of it is looked at. It says
            ``sparsity`` then. One whose scores can be compared between layers (``kfac``) divides better than equal shares do.

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
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}; it must be at least 1")
    ignored, included = ([given] if isinstance(given, str) else list(given) for given in (ignore, include))
    model = bare(model)
    divided = None if shares is None else _divided(model, shares, sparsity, structure)
    if shares is not None:
        asked_of_it = shares.provenance.get("sparsity")
        sparsity = shares.sparsity()["prunable"] if asked_of_it is None else asked_of_it
    asked = Asked(method, sparsity, structure, within, damping, ignored, included, activations, divided)
    kind = get_task(task)
    data = Samples.of(batches, kind.batch).first(samples)
    result = copied(model)
    modes = {module: module.training for module in result.modules()}
    home = InMemory(result, None if device is None else torch.device(device))
    pruning = Pruning(result.eval(), asked, data, home, whole=mixing(result, data, kind))
    keep = {name: solved.keep.cpu() for name, solved in pruning}
    for module, training in modes.items():
        module.training = training
    return _plan(model, asked, {name: keep[name] for name in pruning.layers if name in keep}, pruning, shares), result


def _divided(model: nn.Module, shares: Plan, sparsity: float | None, structure: str) -> dict[str, float]:
    """The share that a plan removes of each parameter.

    Raises:
        UsageError: the plan is of something else than single weights, or a sparsity is given too.
        ArtifactError: it was made for other weights.
    """
    if sparsity is not None:
        raise UsageError("shares says how much goes of every layer; leave sparsity out")
    if structure != "unstructured" or shares.structure != "unstructured":
        other = structure if structure != "unstructured" else shares.structure
        raise UsageError(f"shares divides single weights between layers, and the structure is {other}; take unstructured")
    check_made_for(shares, model)
    return {name: 1 - float(mask.double().mean()) for name, mask in shares.masks().items()}


def _plan(model: nn.Module, asked: Asked, keep: dict[str, Tensor], pruning: Pruning, shares: Plan | None) -> Plan:
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | buffers
    roles, amount = weight_roles(model), asked.amount
    turned = {name: roles[name].output for name in keep if name in roles and roles[name].output}
    by_rows = "rows" if amount.within == "rows" and amount.pattern is None else "uniform"
    provenance = {
        "criterion": asked.method,
        "model": model_digest(model),
        "trajectory": None,
        "allocation": shares.provenance["allocation"] if shares is not None else by_rows,
        "sparsity": amount.sparsity,
        "prunable": list(keep),
        "buffers": list(buffers),
        "layerwise": {**pruning.facts(), **({} if shares is None else {"shares": _named(shares)})},
        **({OUTPUTS: turned} if turned and amount.pattern is not None else {}),
        **({"refused": dict(pruning.refused)} if pruning.refused else {}),
    }
    return Plan(asked.structure, keep, {}, shapes, provenance)


def _named(shares: Plan) -> dict[str, str]:
    return {"criterion": shares.provenance["criterion"], "plan": shares.digest}
