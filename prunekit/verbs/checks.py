"""Does this model take this data? The first, the last and the largest batch, before anything long begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit.batch import Batch, Inputs, Labels, call, device_of, fresh, leaves, named, to
from prunekit.criteria import check_criterion, expand, get_criterion, parse
from prunekit.criteria.scores import unsuited
from prunekit.data import EVAL_BATCH, Split
from prunekit.errors import PrunekitError, StructureError, UsageError, quoted
from prunekit.huggingface import task_of
from prunekit.measure import Measure
from prunekit.plan import GROUPED
from prunekit.recipe import Recipe
from prunekit.structure import find_groups, prunable_parameters
from prunekit.task import LanguageModel, Task, guess_task
from prunekit.task.evaluation import run, unfit
from prunekit.trajectory import Layout
from prunekit.trajectory.rules import find_rule

PROBE = 4
Check = Callable[[Recipe, nn.Module, Mapping[str, Split]], None]
"""What raises where a recipe's model with its data is not what somebody needs."""


def try_once(recipe: Recipe, model: nn.Module, splits: dict[str, Split], training: bool = True) -> None:
    """Checks what a recipe's own pieces do with each other.

    Of every split the first batch, the last one and the first of the largest size that is ever run go through model, task and
    measures; of the training split also through the loss and its gradient.

    Args:
        training: whether the model will be trained; one that is not needs no loss.

    Raises:
        UsageError: names the piece (model, data, loss, target, task, criterion, optimizer rule) and what it did.
    """
    layout = Layout.of(model)
    if not layout.parameters:
        raise UsageError(f"{recipe.model.said} has no trainable parameters")
    bad = next((e.name for e in layout if "@" in e.name or "|" in e.name), None)
    if bad is not None:
        raise UsageError(f"{recipe.model.said}: the parameter name {bad!r} holds '@' or '|', which score files use as separators")
    for criterion in (*recipe.score.criteria, *(p.criterion for p in recipe.prune if p.criterion != "auto")):
        check_criterion(criterion)
    for wanted in recipe.prune:
        _check_units(wanted.criterion, wanted.structure)
    for name in recipe.score.optimizer_rules:
        find_rule(name, recipe.score.optimizer_rules)
    prunable_parameters(model, layout, recipe.prunable.ignore, recipe.prunable.include)
    task = recipe.load_task()
    target = recipe.load_target()
    task.get_target(task.target if target is None else target)
    for name, split in splits.items():
        shared: set[str] | None = None
        _check_every_label(recipe, task, model, split, name)
        for where in _batches(split, recipe.train.batch_size if name == "train" else EVAL_BATCH):
            x, y = split.batch(where)
            _check_finite(x, name)
            outputs = _outputs(recipe, task, model, x, name)
            task.check(outputs, y, f"{name} split")
            _measure(task, outputs, y, name)
            if name == "train" and (training or task.loss.name != "none"):
                _check_loss(recipe, task, model, x, y)
            shared = _check_shared(shared, x, len(where), name)


def _check_units(criterion: str, structure: str) -> None:
    """Raises UsageError where a criterion is to prune units that it does not score."""
    for text in expand(criterion) if criterion != "auto" else ():
        for single in parse(text).singles:
            known = get_criterion(single.text)
            if (fault := unsuited(single.text, known.structure, known.silent_on, structure)) is not None:
                raise UsageError(f"prune: {fault}")


def told_on_itself(splits: Mapping[str, Split]) -> list[str]:
    """What data sets say of themselves, and notes on splits that judge a model by the samples which it was trained on."""
    own = dict.fromkeys(note for split in splits.values() for note in split.notes)
    same = [
        f"note: the {name} and train splits are the same samples; what is measured on them says nothing of new ones"
        for name in ("validation", "test")
        if splits["train"].same_as(splits[name])
    ]
    return [*own, *same]


def _batches(split: Split, most: int) -> list[range]:
    """The first few samples, as many as a whole batch has, and the last batch, which may be smaller."""
    count = len(split)
    last = range(count - (count % most or min(most, count)), count)
    found = [range(min(PROBE, count)), range(min(most, count)), last]
    return list(dict.fromkeys(found))


def _check_shared(before: set[str] | None, x: Inputs, samples: int, split: str) -> set[str] | None:
    """Which inputs have one row a sample must not change from batch to batch; None while batches are too alike to tell."""
    rows = {name for name, tensor in named(x, "inputs").items() if tensor.dim() and len(tensor) == samples}
    if before is not None and before != rows:
        odd = sorted(before ^ rows)[0]
        raise UsageError(
            f"data: {odd} of the {split} split has one row a sample in one batch and not in another; every input must have "
            "samples on its first axis, or belongs into the model"
        )
    return rows


def settled(recipe: Recipe, model: nn.Module, splits: Mapping[str, Split] | None) -> Recipe:
    """The recipe with its task named, where training data and model show one that is not classification.

    Of data in files it also says the classes' names, of a language model's data the bytes that a token stands for, which later
    commands then keep.

    Raises:
        UsageError: they leave doubt, or the model does not take the data.
    """
    if splits is None:
        return recipe
    if recipe.data is not None and recipe.data.files is not None:
        recipe = _told_by_files(recipe, splits)
    recipe = _with_bytes(recipe, splits["test"])
    if recipe.task is not None:
        return recipe
    split = splits["train"]
    x, y = split.batch(range(min(PROBE, len(split))))
    outputs = _outputs(recipe, recipe.load_task(), model, x, "train")
    name = guess_task(outputs, y, recipe.load_loss() is not None, x)
    return recipe if name == "classification" else recipe.model_copy(update={"task": name})


def _told_by_files(recipe: Recipe, splits: Mapping[str, Split]) -> Recipe:
    """The recipe with the order of the classes."""
    found = splits["test"].source
    if recipe.data is not None and recipe.data.classes is None and found.classes is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": list(found.classes)})})
    return recipe


def _with_bytes(recipe: Recipe, test: Split) -> Recipe:
    """The recipe with the bytes that a token of the test texts stands for, of a language model's task that does not say it."""
    task = recipe.load_task()
    if not isinstance(task, LanguageModel) or task.bytes_per_token is not None:
        return recipe
    share = test.bytes_per_token if test.bytes_per_token is not None else getattr(test.source, "bytes_per_token", None)
    if share is None:
        return recipe
    said = {"name": recipe.task} if isinstance(recipe.task, str) else dict(recipe.task or {})
    if "name" not in said or ":" in str(said["name"]):  # a task of the user's own, whose options are its own
        return recipe
    return recipe.model_copy(update={"task": {**said, "bytes_per_token": round(share, 6)}})


def with_task(recipe: Recipe) -> Recipe:
    """The recipe with the task that its pretrained model's class and config say, where nobody named one.

    Raises:
        UsageError: its class is unknown, or has data and answers of which the user must name those that count.
    """
    if recipe.model.pretrained is None or recipe.task is not None:
        return recipe
    name = task_of(Path(recipe.model.pretrained), recipe.model.auto, labelled=recipe.data is not None)
    return recipe if name is None else recipe.model_copy(update={"task": name})


def try_structures(recipe: Recipe, model: nn.Module, splits: dict[str, Split]) -> None:
    """Checks, before a whole recipe is run, that the model takes every structure that the recipe will ask for.

    Raises:
        StructureError: it does not; says where the recipe asks.
    """
    asked = {*recipe.compare.structures, *(p.structure for p in recipe.prune)}
    example = splits["validation"].batch(range(min(2, len(splits["validation"]))))[0]
    for structure in sorted(one for one in asked if one in GROUPED):
        try:
            find_groups(structure, model, example, recipe.structure.mappings())
        except StructureError as error:
            raise StructureError(f"{error}; take {structure} out of the recipe's compare.structures and prune") from error


def _check_finite(x: Inputs, split: str) -> None:
    for tensor in leaves(x):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UsageError(f"data: inputs of the {split} split hold NaN or Inf")


def _outputs(recipe: Recipe, task: Task, model: nn.Module, x: Inputs, split: str) -> Tensor:
    try:
        out = run(model, (x, None), task)
    except PrunekitError:
        raise
    except Exception as error:  # the user's own model and data
        raise unfit(recipe.model.source, x, error, f"data of the {split} split, ") from error
    samples = len(leaves(x)[0])
    if out.dim() < 1 or len(out) != samples or not out.is_floating_point():
        raise UsageError(
            f"model: {recipe.model.source} must return one float tensor (samples, …), returned shape {tuple(out.shape)}, "
            f"{out.dtype}, for {samples} samples"
        )
    if bool(torch.isnan(out).any()) or bool((out == torch.inf).any()):
        raise UsageError(f"data: the model's outputs on the {split} split hold NaN or Inf; so may its inputs")
    return out


def _measure(task: Task, outputs: Tensor, y: Labels, split: str) -> None:
    """Every measure once, so that none fails after training."""
    outputs, labels = outputs.cpu(), to(y, "cpu")
    for measure in task.measures:
        _try(task, measure, outputs, labels, split)
    for measure in task.closeness:
        _try(task, measure, outputs, (outputs, labels), split)


def _try(task: Task, measure: Measure, outputs: Tensor, labels: Labels, split: str) -> None:
    what = f"measure {measure.name}"
    try:
        value = measure.of(measure.each(outputs, labels).double())
    except PrunekitError:
        raise
    except Exception as error:  # a task of the user's own, or data that no check foresaw
        raise UsageError(f"task {task.name}: {what} fails on the {split} split: {quoted(error)}") from error
    if not -math.inf < value < math.inf:
        raise UsageError(f"task {task.name}: {what} is {value} on the {split} split")


def _check_every_label(recipe: Recipe, task: Task, model: nn.Module, split: Split, name: str) -> None:
    """Labels that lie in memory are all looked at; of others those of the batches that were tried."""
    if split.held is None or not isinstance(split.held[1], Tensor):
        return
    inputs, labels = split.held
    _check_finite(inputs, name)
    outputs = _outputs(recipe, task, model, split.batch(range(min(2, len(split))))[0], name)
    task.check(outputs[:1].expand(len(labels), *outputs.shape[1:]), labels, f"{name} split")


def _takes_single_losses(criterion: str) -> bool:
    return any(
        dict(single.options).get("target", "loss" if single.name in ("taylor", "fisher") else None) == "loss"
        for text in expand(criterion)
        for single in parse(text).singles
    )


def _check_loss(recipe: Recipe, task: Task, model: nn.Module, x: Inputs, y: Labels) -> None:
    batch: Batch = x, y
    device = device_of(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        try:
            outputs, labels = task.outputs(call(model, fresh(to(batch[0], device)))), to(batch[1], device)
            task.check_loss(outputs.detach(), labels, "train split")
            if any(_takes_single_losses(text) for text in recipe.score.criteria):
                task.loss.factors(outputs.detach(), labels)
            value = task.loss.batch(outputs, labels)
            if not isinstance(value, Tensor) or value.dim() != 0:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"loss: {recipe.loss} must return one number as a tensor, returned {what}")
            value.backward()
        except UsageError:
            raise
        except Exception as error:  # the user's own loss
            raise UsageError(f"loss: {recipe.loss} fails on a training batch: {quoted(error)}") from error
        finally:
            model.load_state_dict(state)
            model.zero_grad()
