"""A budget of tokens divided between mask and weights, as short tries of some divisions do on validation data.

Where the tokens are more than the training samples have, learning goes over the same ones again and again, and a layer-wise
method, which takes no token, may do better: the learnt model is then compared with ADMM's before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.apply import Manifest, masked
from prunekit.errors import ArtifactError, PrunekitError, UsageError
from prunekit.measure import merit
from prunekit.plan import Plan
from prunekit.progress import track
from prunekit.recipe import Finetune, Layerwise, Prune, Refine, Steps
from prunekit.recipe.pruning import Stream as StreamKeys
from prunekit.recipe.training import Distill
from prunekit.repair.stream import Stream
from prunekit.repair.streamed import Streaming
from prunekit.steps import finetune
from prunekit.task.evaluation import References, evaluate
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.copies import copied
from prunekit.verbs.layerwise import by_layers
from prunekit.verbs.refining import refining
from prunekit.verbs.run_folder import Run
from prunekit.verbs.scheduling import finetuning_of

SHARES = (0.0, 1 / 3, 2 / 3, 1.0)
"""Of the tokens, for the weights: the divisions that are tried."""
TRY = 1 / 20
"""Of the tokens, for each try; what is left is spent by the best division."""


LAYERWISE = Layerwise(method="admm")
"""The layer-wise method that loses least (docs/language-models.md)."""


class LayersAreBetter(Exception):
    """The learnt model is worse than ADMM's on validation data.

    Attributes:
        plan, model: ADMM's.
        division: the facts, with the comparison.
    """

    def __init__(self, plan: Plan, model: nn.Module, division: dict[str, Any]) -> None:
        super().__init__("a layer-wise method does better")
        self.plan, self.model, self.division = plan, model, division


def looks_again(run: Run, tokens: int) -> bool:
    """Whether so many tokens are more than the training samples have."""
    samples = run.batches("train")
    return tokens > len(samples) * Stream(samples, 1).tokens()


def beside_layers(run: Run, wanted: Prune, division: Mapping[str, Any]) -> Callable[[nn.Module], dict[str, Any]]:
    """What compares a finished model with ADMM's of as many weights on validation data, and gives the division with the figures.

    It raises LayersAreBetter where ADMM's is better by what criteria are chosen by.
    """

    def compared(model: nn.Module) -> dict[str, Any]:
        try:
            plan, other = by_layers(run, LAYERWISE, layerwise_of(wanted))
        except PrunekitError as error:
            return {"division": {**division, "layerwise": {"method": LAYERWISE.method, "why": str(error)}}}
        names = plan.provenance["prunable"]
        left, learnt_left = (_left(one, names) for one in (other, model))
        if left > 1.001 * learnt_left:
            why = f"it leaves {left:,} weights where {learnt_left:,} stay"
            return {"division": {**division, "layerwise": {"method": LAYERWISE.method, "why": why}}}
        samples = run.batches("validation")
        references = References(run.model, samples, run.task)
        layers, learnt = (evaluate(one, samples, run.task, references).figures() for one in (other, model))
        better = merit(run.task.choosing, layers) > merit(run.task.choosing, learnt)
        found = {**division, "layerwise": {"method": LAYERWISE.method, "figures": layers, "learnt": learnt, "better": better}}
        if better:
            raise LayersAreBetter(plan, other, found)
        return {"division": found}

    return compared


def layerwise_of(wanted: Prune) -> Prune:
    """The same amount of the same structure, by layers."""
    return wanted.model_copy(update={"tokens": None, "refine": None, "finetune": None, "layerwise": LAYERWISE})


def _left(model: nn.Module, names: Collection[str]) -> int:
    return sum(int(tensor.count_nonzero()) for name, tensor in named_tensors(model).items() if name in names)


def divide(run: Run, wanted: Prune, plan: Plan) -> dict[str, Any]:
    """The share of the tokens for the weights, and what the tries came to.

    Every try learns a mask and then tunes weights, each for its share of ``TRY`` of the tokens; models are compared on
    validation data by what criteria are chosen by.

    Args:
        plan: says how many weights stay, and where tries begin.

    Returns:
        ``weights``, the share; ``tries``: by share, the model's figures.

    Raises:
        UsageError: the smallest part of a try is less than two batches.
    """
    assert wanted.tokens is not None
    batch = max(Streaming.batch, run.recipe.train.batch_size)
    least = math.ceil(2 * Stream(run.batches("train"), batch).tokens() / (TRY * SHARES[1]))
    if wanted.tokens < least:
        raise UsageError(
            f"tokens is {wanted.tokens:,}, too few to try divisions of it; give {least:,} at least, or say each part "
            "(--refine-tokens, --tune-tokens)"
        )
    samples = run.batches("validation")
    references = References(run.model, samples, run.task)
    tries = {}
    for share in track(SHARES, "divide tokens", len(SHARES)):
        tries[share] = evaluate(_tried(run, wanted, plan, share), samples, run.task, references).figures()
    best = max(SHARES, key=lambda share: merit(run.task.choosing, tries[share]))
    return {"weights": best, "tries": {f"{share:.2f}": figures for share, figures in tries.items()}}


def _tried(run: Run, wanted: Prune, plan: Plan, share: float) -> nn.Module:
    for_mask, for_weights = parts(round(TRY * (wanted.tokens or 0)), share)
    found = plan if for_mask is None else refining(run, for_mask)(plan)
    if for_weights is None:
        return masked(run.model, found)
    model = copied(run.model)
    finetune(model, found, finetuning_of(run, Steps(finetune=tuning(wanted, for_weights))))
    return model.to(next(run.model.parameters()).device)


def parts(tokens: int, share: float) -> tuple[Refine | None, int | None]:
    """How a mask is learnt and on how many tokens weights are tuned; None for nothing of it."""
    weights = round(share * tokens)
    mask = tokens - weights
    return (Refine(stream=StreamKeys(tokens=mask)) if mask else None), weights or None


def tuning(wanted: Prune, tokens: int) -> Finetune:
    """Weights tuned by the divergence from the dense model, in other respects as ``finetune`` says."""
    given = wanted.finetune or Finetune()
    return given.model_copy(update={"tokens": tokens, "distill": given.distill or Distill(weight=1.0, temperature=1.0)})


def by_division(wanted: Prune, share: float) -> Prune:
    """What is asked for with its tokens divided."""
    assert wanted.tokens is not None
    left = wanted.tokens - len(SHARES) * round(TRY * wanted.tokens)
    for_mask, for_weights = parts(left, share)
    changes = {
        "tokens": None,
        "refine": for_mask or Refine(when="never"),
        "finetune": None if for_weights is None else tuning(wanted, for_weights),
    }
    return wanted.model_copy(update=changes)


def earlier(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The division that a finished model was made by, if the same was asked for."""
    if not (folder / "prunekit.json").exists():
        return None
    try:
        found = Manifest.load(folder / "prunekit.json").facts.get("division")
    except ArtifactError:
        return None  # whoever reuses the folder says what is wrong with it
    return dict(found) if found and found.get("asked") == dict(asked) else None
