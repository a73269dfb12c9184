"""Does this model take this data? One batch through model, loss and backward pass, before anything long begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data import Split
from prunekit.errors import StructureError, UsageError
from prunekit.plan import GROUPED
from prunekit.recipe import Recipe
from prunekit.structure import find_groups, prunable_parameters
from prunekit.trajectory import Layout

PROBE = 4


def probe(recipe: Recipe, model: nn.Module, splits: dict[str, Split]) -> None:
    """Checks what a recipe's own pieces do with each other.

    Raises:
        UsageError: names the piece (model, data, loss, target) and what it did.
    """
    layout = Layout.of(model)
    if not layout.parameters:
        raise UsageError(f"model.factory: {recipe.model.factory} has no trainable parameters")
    bad = next((e.name for e in layout if "@" in e.name or "|" in e.name), None)
    if bad is not None:
        raise UsageError(f"model.factory: the parameter name {bad!r} holds '@' or '|', which score files use as separators")
    prunable_parameters(model, layout, recipe.prunable.ignore, recipe.prunable.include)
    recipe.load_target()
    loss = recipe.load_loss()
    for name, split in splits.items():
        x, y = split.batch(range(min(PROBE, len(split))))
        out = _outputs(recipe, model, x, name)
        _check_labels(recipe, split, out, name)
        if name == "train":
            _check_loss(recipe, loss, model, x, y)


def probe_structures(recipe: Recipe, model: nn.Module, splits: dict[str, Split]) -> None:
    """Checks, before a whole recipe is run, that the model takes every structure that the recipe will ask for.

    Raises:
        StructureError: it does not; says where the recipe asks.
    """
    asked = {*recipe.compare.structures, *(p.structure for p in recipe.prune)}
    example = splits["validation"].batch(range(min(2, len(splits["validation"]))))[0]
    for structure in GROUPED:
        if structure not in asked:
            continue
        try:
            find_groups(structure, model, example, recipe.structure.mappings())
        except StructureError as error:
            raise StructureError(f"{error}; take {structure} out of the recipe's compare.structures and prune") from error


def _outputs(recipe: Recipe, model: nn.Module, x: Tensor, split: str) -> Tensor:
    training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(x)
    except Exception as error:  # the user's own model and data
        raise UsageError(
            f"model: {recipe.model.factory} fails on data of the {split} split, inputs {tuple(x.shape)} of {x.dtype}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(training)
    if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != len(x) or not out.is_floating_point():
        what = f"shape {tuple(out.shape)}, {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"model: {recipe.model.factory} must return one float tensor (samples, classes), returned {what}")
    if not torch.isfinite(out).all():
        raise UsageError(f"data: the model's outputs on the {split} split hold NaN or Inf; so may its inputs")
    return out


def _check_labels(recipe: Recipe, split: Split, out: Tensor, name: str) -> None:
    if recipe.loss != "cross_entropy":
        return
    y = split.pair[1] if split.pair else split.batch(range(min(64, len(split))))[1]
    classes = out.shape[1]
    if y.dtype != torch.int64 or y.dim() != out.dim() - 1:
        raise UsageError(
            f"data: labels of the {name} split are {y.dtype} {tuple(y.shape)}; cross_entropy needs class indices, int64"
        )
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise UsageError(
            f"data: labels of the {name} split go from {int(y.min())} to {int(y.max())}, the model has {classes} outputs"
        )
    if split.pair and split.pair[0].is_floating_point() and not torch.isfinite(split.pair[0]).all():
        raise UsageError(f"data: inputs of the {name} split hold NaN or Inf")


def _check_loss(recipe: Recipe, loss: object, model: nn.Module, x: Tensor, y: Tensor) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        try:
            value = (loss if callable(loss) else F.cross_entropy)(model(x), y)
            if not isinstance(value, Tensor) or value.dim() != 0:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"loss: {recipe.loss} must return one number as a tensor, returned {what}")
            value.backward()
        except UsageError:
            raise
        except Exception as error:  # the user's own loss
            raise UsageError(f"loss: {recipe.loss} fails on a training batch: {type(error).__name__}: {error}") from error
        finally:
            model.load_state_dict(state)
            model.zero_grad()
