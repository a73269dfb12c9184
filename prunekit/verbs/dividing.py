"""A budget of tokens spent on a mask, on weights, or on both together, from the given mask or from a layer-wise method's model.

Where whole units go, the weights that stay make up for them first, by least squares, which takes no token. Short tries of each
say on which, by validation data. Where the tokens are more than the training samples have, learning goes over the same ones again
and again, and a layer-wise method, which takes no token, may do better: the learnt model is then compared with ADMM's before it
is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.apply import Manifest, masked
from prunekit.data import Samples
from prunekit.errors import ArtifactError, PrunekitError, UsageError
from prunekit.layerwise import amount_of, get_method
from prunekit.measure import merit
from prunekit.plan import GROUPED, Plan
from prunekit.progress import track
from prunekit.recipe import Finetune, Layerwise, Prune, Refine, Steps
from prunekit.recipe.pruning import Stream as StreamKeys
from prunekit.recipe.training import Distill
from prunekit.repair.stream import Stream
from prunekit.repair.streamed import LEAST, Streaming
from prunekit.steps import finetune
from prunekit.structure.joined import parts_of
from prunekit.task.evaluation import References, evaluate
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.copies import copied
from prunekit.verbs.compensating import compensated
from prunekit.verbs.layerwise import by_layers, layerwise_request, shares_of
from prunekit.verbs.refining import refining
from prunekit.verbs.run_folder import Run
from prunekit.verbs.together import learnt_together, together_request
from prunekit.verbs.tuning import finetuning_of

MASK, TOGETHER, IN_TURN, WEIGHTS = "mask", "together", "mask, then weights", "weights"
LAYERS, LAYERS_TOGETHER = "layers, then weights", "layers, then together"
REFITTED = {WEIGHTS: "refit, then weights", IN_TURN: "mask, refit, then weights"}
"""The same where whole units go: the weights that stay are compensated once it is known which these are."""
BOTH = (TOGETHER, LAYERS_TOGETHER)
"""What learns mask and weights in the same steps."""
SHARES = {MASK: 0.0, IN_TURN: 2 / 3, WEIGHTS: 1.0, LAYERS: 1.0, REFITTED[IN_TURN]: 2 / 3, REFITTED[WEIGHTS]: 1.0}
"""Of the tokens, for the weights; the rest is for the mask."""
TRY = 1 / 20
"""Of the tokens, for each try; what is left is spent by the best division."""


LAYERWISE = Layerwise(method="admm")
"""The layer-wise method that loses least (docs/language-models.md)."""


class LayersAreBetter(Exception):
    """The learnt model is no better than ADMM's on validation data.

    Attributes:
        plan, model: ADMM's.
        division: the facts, with the comparison.
    """

    def __init__(self, plan: Plan, model: nn.Module, division: dict[str, Any]) -> None:
        super().__init__("a layer-wise method does better")
        self.plan, self.model, self.division = plan, model, division


class ByLayers:
    """ADMM's plan and model for what is asked for, found once however often they are wanted: a copy of the model is held."""

    def __init__(self, run: Run, wanted: Prune) -> None:
        self._run, self._wanted = run, wanted

    @cached_property
    def found(self) -> tuple[Plan, nn.Module]:
        """The model is not to be changed.

        Raises:
            PrunekitError: the layers cannot be solved, or the scores that say how much of each layer goes are damaged.
        """
        return by_layers(self._run, LAYERWISE, layerwise_of(self._run, self._wanted))

    def forget(self) -> None:
        """Gives the model up."""
        vars(self).pop("found", None)


def looks_again(run: Run, tokens: int) -> bool:
    """Whether so many tokens are more than the training samples have."""
    samples = run.batches("train")
    return tokens > len(samples) * Stream(samples, 1).tokens()


def beside_layers(run: Run, layers: ByLayers, division: Mapping[str, Any]) -> Callable[[nn.Module], dict[str, Any]]:
    """What compares a finished model with ADMM's of as many weights on validation data, and gives the division with the figures.

    It raises LayersAreBetter where ADMM's is as good or better by what criteria are chosen by.
    """

    def compared(model: nn.Module) -> dict[str, Any]:
        try:
            plan, other = layers.found
        except ArtifactError:
            raise
        except PrunekitError as error:
            return {"division": {**division, "layerwise": {"method": LAYERWISE.method, "why": str(error)}}}
        names = plan.provenance["prunable"]
        left, learnt_left = (_left(one, names) for one in (other, model))
        if left > 1.001 * learnt_left:
            why = f"it leaves {left:,} weights where {learnt_left:,} stay"
            return {"division": {**division, "layerwise": {"method": LAYERWISE.method, "why": why}}}
        samples = run.batches("validation")
        references = References(run.model, samples, run.task)
        solved, learnt = (evaluate(one, samples, run.task, references).figures() for one in (other, model))
        better = merit(run.task.choosing, solved) >= merit(run.task.choosing, learnt)  # as good without a step
        found = {**division, "layerwise": {"method": LAYERWISE.method, "figures": solved, "learnt": learnt, "better": better}}
        if better:
            raise LayersAreBetter(plan, other, found)
        return {"division": found}

    return compared


def fits_layers(wanted: Prune) -> bool:
    """Whether a layer-wise method could do what is asked for: single weights or patterns, and no say in any layer's share."""
    if wanted.structure in GROUPED or wanted.ratios or wanted.floor or wanted.classes:
        return False
    try:
        amount_of(wanted.structure, wanted.sparsity, None, get_method(LAYERWISE.method))
    except UsageError:
        return False
    return True


def layerwise_of(run: Run, wanted: Prune) -> Prune:
    """The same amount of the same structure, by layers; where ``kfac`` has been scored, it says how much of each layer goes."""
    scored = wanted.structure == "unstructured" and run.score_path("kfac").exists()
    plain = {"tokens": None, "refine": None, "finetune": None, "criterion": "kfac" if scored else "auto", "allocation": None}
    return wanted.model_copy(update={**plain, "layerwise": LAYERWISE})


def _left(model: nn.Module, names: Collection[str]) -> int:
    return sum(int(tensor.count_nonzero()) for name, tensor in named_tensors(model).items() if name in names)


def menu(wanted: Prune) -> tuple[str, ...]:
    """What is tried: both together, from the given mask and from layers; in turn, and weights alone after layers, where both
    cannot be learnt together.

    Of whole units a mask alone is not: once refitted it is ahead of weights after so few tokens as a try has, and behind after
    all of them.
    """
    together = () if _apart(wanted) else (TOGETHER,)
    if wanted.structure in GROUPED:
        return REFITTED[IN_TURN], *together, REFITTED[WEIGHTS]
    by_layers = [LAYERS if _apart(wanted) else LAYERS_TOGETHER] if fits_layers(wanted) else []
    return MASK, *(together or (IN_TURN,)), WEIGHTS, *by_layers


def _apart(wanted: Prune) -> str:
    """Why mask and weights are not learnt together: it is said how weights are trained, by matrices of low rank for instance, or
    experts go, whose router zeros do not tell. Empty where they are.
    """
    given = wanted.finetune
    said = [key for key in ("lora", "optimizer", "schedule") if given is not None and getattr(given, key) is not None]
    if said:
        return f"{' and '.join(said)} {'say' if said[1:] else 'says'} how weights are trained alone"
    return "routers choose otherwise once experts are gone" if "experts" in parts_of(wanted.structure) else ""


def divide(run: Run, wanted: Prune, plan: Plan, layers: ByLayers) -> dict[str, Any]:
    """What the tokens are best spent on, and what the tries came to.

    Every try takes ``TRY`` of the tokens; models are compared on validation data by what criteria are chosen by.

    Args:
        plan: says how many weights stay, and where tries begin.

    Returns:
        ``way``; ``tries``: by way, the model's figures; ``left_out``: why one was not, where a layer-wise method fails, or
        where mask and weights cannot be learnt together.

    Raises:
        UsageError: the smallest part of a try is less than two batches.
        ArtifactError: the scores that say how much of each layer goes are damaged.
    """
    assert wanted.tokens is not None
    if fits_layers(wanted):
        shares_of(run, layerwise_of(run, wanted))  # reads them before anything long begins
    check_tokens(wanted, run.batches("train"), run.recipe.train.batch_size)
    samples = run.batches("validation")
    references = References(run.model, samples, run.task)
    ways, tries, failed = menu(wanted), {}, dict[str, str]()
    if apart := _apart(wanted):
        failed[TOGETHER] = apart
    for way in track(ways, "divide tokens", len(ways)):
        try:
            tries[way] = evaluate(_tried(run, wanted, plan, way, layers), samples, run.task, references).figures()
        except PrunekitError as error:
            if way not in (LAYERS, LAYERS_TOGETHER) or isinstance(error, ArtifactError):
                raise
            failed[way] = str(error)
    best = max(tries, key=lambda way: merit(run.task.choosing, tries[way]))
    return {"way": best, "tries": tries, **({"left_out": failed} if failed else {})}


def check_tokens(wanted: Prune, samples: Samples, batch: int) -> None:
    """Refuses fewer tokens than what is asked for takes, before anything long begins.

    Args:
        samples: of the training data.
        batch: that weights are trained with.

    Raises:
        UsageError: says how many it takes.
    """
    if wanted.tokens is not None:
        least = math.ceil(2 * Stream(samples, max(Streaming.batch, batch)).tokens() / (TRY * (1 - SHARES[IN_TURN])))
        if wanted.tokens < least:
            raise UsageError(
                f"tokens is {wanted.tokens:,}, too few to try what to spend them on; give {least:,} at least, or say each part "
                "(--refine-tokens, --tune-tokens)"
            )
    if wanted.repair is not None and (stream := wanted.repair.stream) is not None:
        Stream(samples, stream.batch).steps(stream.tokens, "refine", LEAST)
    if wanted.finetune is not None and wanted.finetune.tokens is not None:
        Stream(samples, batch).steps(wanted.finetune.tokens, "finetune")


def _tried(run: Run, wanted: Prune, plan: Plan, way: str, layers: ByLayers) -> nn.Module:
    tokens = round(TRY * (wanted.tokens or 0))
    if way in BOTH:
        return learnt(run, wanted, plan, way, tokens, layers)[1]
    start = run.model
    if way == LAYERS:
        plan, start = layers.found
    for_mask, for_weights = parts(tokens, SHARES[way])
    found = plan if for_mask is None else refining(run, for_mask)(plan)
    if for_weights is None:
        return masked(run.model, found)
    if way in REFITTED.values():
        start = compensated(run, {}, run.model, found)
    model = copied(start)
    finetune(model, found, finetuning_of(run, Steps(finetune=tuning(wanted, for_weights))))
    return model.to(next(run.model.parameters()).device)


def learnt(
    run: Run, wanted: Prune, plan: Plan, way: str, tokens: int, layers: ByLayers, folder: Path | None = None
) -> tuple[Plan, nn.Module]:
    """Plan and model of a way that learns both together.

    Args:
        plan: the given one, where the way does not begin by layers.
        folder: where the path goes; None for nowhere.
    """
    start = None
    if way == LAYERS_TOGETHER:
        plan, start = layers.found
    return learnt_together(run, wanted, plan, tokens, start, folder)


def learnt_request(run: Run, wanted: Prune, asked: Mapping[str, Any], way: str) -> dict[str, Any]:
    """What decides a model of a way that learns both together, for reuse.

    Args:
        asked: what was asked for, without how it is learnt.
    """
    layers = {} if way == TOGETHER else {"by_layers": layerwise_request(run, LAYERWISE, layerwise_of(run, wanted))}
    return {**asked, **layers, **together_request(wanted)}


def tokens_left(wanted: Prune, division: Mapping[str, Any]) -> int:
    """What the tries of a division left, an earlier prunekit's of other ways too."""
    assert wanted.tokens is not None
    failed = [way for way in division.get("left_out", {}) if way in (LAYERS, LAYERS_TOGETHER)]
    return wanted.tokens - (len(division["tries"]) + len(failed)) * round(TRY * wanted.tokens)


def parts(tokens: int, share: float) -> tuple[Refine | None, int | None]:
    """How a mask is learnt and on how many tokens weights are tuned; None for nothing of it."""
    weights = round(share * tokens)
    mask = tokens - weights
    return (Refine(stream=StreamKeys(tokens=mask)) if mask else None), weights or None


def tuning(wanted: Prune, tokens: int) -> Finetune:
    """Weights tuned by the divergence from the dense model, in other respects as ``finetune`` says."""
    given = wanted.finetune or Finetune()
    return given.model_copy(update={"tokens": tokens, "distill": given.distill or Distill(weight=1.0, temperature=1.0)})


def by_division(run: Run, wanted: Prune, division: Mapping[str, Any]) -> Prune:
    """What is asked for with its tokens divided, of any way that does not learn ``BOTH``."""
    way = division["way"]
    for_mask, for_weights = parts(tokens_left(wanted, division), SHARES[way])
    tuned = {"finetune": None if for_weights is None else tuning(wanted, for_weights)}
    if way == LAYERS:
        return layerwise_of(run, wanted).model_copy(update=tuned)
    said = {"tokens": None, "refine": for_mask or Refine(when="never"), "compensate": way in REFITTED.values()}
    return wanted.model_copy(update={**said, **tuned})


def earlier(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The division that a finished model was made by, if the same was asked for."""
    if not (folder / "prunekit.json").exists():
        return None
    try:
        found = Manifest.load(folder / "prunekit.json").facts.get("division")
    except ArtifactError:
        return None  # whoever reuses the folder says what is wrong with it
    return dict(found) if found and found.get("asked") == dict(asked) else None
