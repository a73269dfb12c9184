"""Ways of language models: masks and weights found by layers, or learnt from a stream, all of them from as many tokens.

Each gives the plan, and the model where its weights are others than the dense one's. ``X+tuned`` is way X, then its weights tuned
by their divergence from the dense model with the mask held: for all of the tokens where X takes none, else for two thirds of
them, and X for the rest. ``together`` is mask and weights in the same steps, ``X+together`` begins with the mask and the weights
of layer-wise method X. ``tuned`` alone tunes under the plan's own mask.
``refit`` in a name: before that, what stays of every layer keeps its outputs, by least squares; of whole units, where a layer's
outputs all lose the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunekit.apply import layerwise, masked
from prunekit.batch import Batch
from prunekit.errors import UsageError
from prunekit.layerwise import METHODS, prune_layerwise
from prunekit.plan import Plan
from prunekit.repair.refine import refine
from prunekit.repair.stream import Stream
from prunekit.repair.streamed import Streaming
from prunekit.repair.together import learn_together
from prunekit.search.rivals.streamed import STREAMED
from prunekit.steps.finetune import Finetuning, finetune
from prunekit.steps.rate import ByDivergence
from prunekit.structure import implied_sparsity
from prunekit.training import Distillation, batches_per_epoch
from prunekit.trajectory.copies import copied

if TYPE_CHECKING:
    from prunekit.search.ways import RepairSamples

TUNED, REFIT, TOGETHER = "tuned", "refit", "together"
SHARE = 2 / 3
"""Of the tokens, for the weights, where a mask is learnt first."""
RATES = {"leap": 3e-3, "maskllm": 3e-3, "block-reconstruction": 1e-2}
"""Rivals' rates at a few hundred steps; their papers' are for thousands."""
BY_LAYERS = tuple(name for name in METHODS if name != "magnitude")
CALIBRATION = 256
"""Training windows that layer-wise methods look at, the first ones."""

Found = tuple[Plan, nn.Module | None]


def streaming(material: RepairSamples) -> Streaming:
    """How a study learns from streams.

    Raises:
        UsageError: it does not say.
    """
    if material.stream is None:
        raise UsageError("this way learns from a stream of tokens; give refine.stream (tokens)")
    return material.stream


def steps_of(material: RepairSamples, share: float = 1.0) -> int:
    """Batches that a share of the tokens are."""
    how = streaming(material)
    per_batch = Stream(material.train, how.batch).tokens()
    return max(1, int(how.tokens * share) // per_batch)


def streamed(plan: Plan, model: nn.Module, material: RepairSamples, share: float = 1.0) -> Found:
    """``prunekit.refine`` from a stream."""
    how = streaming(material)
    changed = Streaming(**{**vars(how), "tokens": int(how.tokens * share)})
    found = refine(
        plan, model, material.train, accept=material.accept, seed=material.seed, task=material.evidence.task, stream=changed
    )
    return found, None


def together(plan: Plan, model: nn.Module, material: RepairSamples, start: nn.Module | None = None) -> Found:
    """``prunekit.repair.learn_together``: mask and weights in the same steps."""
    how, task = streaming(material), material.evidence.task
    return learn_together(plan, model, material.train, how, accept=material.accept, start=start, seed=material.seed, task=task)


def by_rival(plan: Plan, model: nn.Module, material: RepairSamples, share: float = 1.0, *, name: str) -> Found:
    """A rival that learns from a stream."""
    device = next(model.parameters()).device
    stream = Stream(material.train, streaming(material).batch, device, material.seed)
    steps = steps_of(material, share)
    found, made = STREAMED[name](
        plan, model, stream, steps=steps, task=material.evidence.task, rate=RATES[name], seed=material.seed
    )
    return found, made if name == "block-reconstruction" else None


def by_layers(plan: Plan, model: nn.Module, material: RepairSamples, *, method: str) -> Found:
    """A layer-wise method that takes as much of each layer as the plan; of the plan no more is looked at."""
    shares = plan if implied_sparsity(plan.structure) is None else None
    samples = material.train.first(CALIBRATION)
    refused = [name for name, _ in model.named_parameters() if name not in plan.provenance["prunable"]]
    found, made = prune_layerwise(
        model, samples, method=method, structure=plan.structure, ignore=refused, task=material.evidence.task, shares=shares
    )
    return found, made


def tuned(plan: Plan, model: nn.Module, material: RepairSamples, share: float = 1.0, start: nn.Module | None = None) -> Found:
    """Weights tuned under the plan's mask, by their divergence from the dense model.

    Args:
        start: the masked model to begin with; the dense one's weights where None.
    """
    how, task, device = streaming(material), material.evidence.task, next(model.parameters()).device
    every = [int(i) for group in material.train.groups for i in group]

    def batch(indices: Tensor) -> Batch:
        return material.train.fetch([every[int(i)] for i in indices])

    def scheduler(optimizer: torch.optim.Optimizer, total: int) -> object:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    steps, made = steps_of(material, share), copied(start if start is not None else masked(model, plan))
    options = Finetuning(
        batch=batch,
        samples=len(every),
        optimizer=lambda one: torch.optim.AdamW(one.parameters(), weight_decay=0.0),
        scheduler=scheduler,
        task=task,
        epochs=-(-steps // batches_per_epoch(len(every), how.batch, drop_last=True)),
        batch_size=how.batch,
        seed=material.seed,
        drop_last=True,
        distill=Distillation(model, 1.0, 1.0, task),
        device=device,
        most=steps,
        rate=ByDivergence(model, material.train.first(CALIBRATION) if material.accept is None else material.accept, task),
    )
    finetune(made, plan, options)
    return plan, made


def refit(
    plan: Plan, model: nn.Module, material: RepairSamples, share: float = 1.0, *, way: Callable[..., Found] | None = None
) -> Found:
    """The weights of the plan, or of what ``way`` makes of it, by least squares on every layer's outputs."""
    found = plan if way is None else way(plan, model, material, share=share)[0]
    return found, layerwise(model, found, material.train.first(CALIBRATION), task=material.evidence.task)


def then_tuned(plan: Plan, model: nn.Module, material: RepairSamples, *, way: Callable[..., Found], learns: bool) -> Found:
    """Way, then weights."""
    found, made = way(plan, model, material, **({"share": 1 - SHARE} if learns else {}))
    return tuned(found, model, material, SHARE if learns else 1.0, made)


def then_together(plan: Plan, model: nn.Module, material: RepairSamples, *, way: Callable[..., Found]) -> Found:
    """Way, then mask and weights from there."""
    found, made = way(plan, model, material)
    return together(found, model, material, made)


LEARNING: dict[str, Callable[..., Found]] = {
    "streamed": streamed, **{name: partial(by_rival, name=name) for name in STREAMED},
}  # fmt: skip
LOOKING: dict[str, Callable[..., Found]] = {name: partial(by_layers, method=name) for name in BY_LAYERS}
OF_UNITS: dict[str, Callable[..., Found]] = {REFIT: refit, f"streamed+{REFIT}": partial(refit, way=streamed)}
WAYS: dict[str, Callable[..., Found]] = {
    **LEARNING,
    **LOOKING,
    **OF_UNITS,
    TOGETHER: together,
    TUNED: tuned,
    **{f"{name}+{TUNED}": partial(then_tuned, way=way, learns=True) for name, way in LEARNING.items()},
    **{f"{name}+{TUNED}": partial(then_tuned, way=way, learns=False) for name, way in LOOKING.items()},
    **{f"{name}+{TOGETHER}": partial(then_together, way=way) for name, way in LOOKING.items()},
    **{f"{name}+{TUNED}": partial(then_tuned, way=way, learns=name != REFIT) for name, way in OF_UNITS.items()},
}
"""By name."""


def ways_for(grouped: bool, runs: bool) -> dict[str, Callable[..., Found]]:
    """Those that take plans of whole units, or else of single weights; in ``runs`` of M or not."""
    alone = {*OF_UNITS, *(f"{name}+{TUNED}" for name in OF_UNITS)}
    of_units = {"streamed", TOGETHER, TUNED, f"streamed+{TUNED}", *alone}
    return {
        name: way
        for name, way in WAYS.items()
        if (name in of_units if grouped else name not in alone) and (runs or not name.startswith("maskllm"))
    }
