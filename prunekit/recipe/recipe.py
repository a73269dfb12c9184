"""A whole run as a recipe says it: read, checked before anything runs, and written resolved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from prunekit import bounded, checkpoint
from prunekit.data.files.options import every_placed
from prunekit.errors import ArtifactError, UsageError
from prunekit.huggingface import load_model, new_model
from prunekit.imports import call, load_object
from prunekit.recipe.building import optimizer_of, scheduler_of
from prunekit.recipe.pruning import Prune
from prunekit.recipe.sections import Compare, Data, Eval, Model, Prunable, Score, Structure, Train
from prunekit.recipe.values import Whole, check_device, known
from prunekit.recipe.yaml_file import read_yaml, to_yaml
from prunekit.task import TASKS, Classification, Task, get_task
from prunekit.training import AUGMENTATIONS, Augment

RESOLVED = "# The resolved recipe of this run: every value, defaults included.\n"
OWN_LOSSES = ("cross_entropy", "task")
"""Losses by name: both are the task's own, ``cross_entropy`` of tasks with classes."""


class Recipe(Whole):
    """A whole run. Keys that are not here are refused.

    ``task``: what the model is for, a name from ``prunekit.task.TASKS``, or a mapping of its ``name`` and options, or a
    ``factory`` (``module:task``) and its ``args``; null where data and model leave no doubt. ``loss``: ``cross_entropy``,
    ``task`` (the task's own), or ``module:function``.

    ``threads``: that torch computes with; null leaves it to torch. Small models are as fast with one, and keep their
    speed when other programs want the processor too.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    model: Model
    data: Data | None = None
    task: str | dict[str, Any] | None = None
    loss: str = "cross_entropy"
    train: Train = Train()
    prunable: Prunable = Prunable()
    structure: Structure = Structure()
    score: Score = Score()
    compare: Compare = Compare()
    prune: list[Prune] = []
    eval: Eval = Eval()

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        return value if ":" in value else known(value, OWN_LOSSES, "loss")

    @field_validator("task")
    @classmethod
    def _task(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        name = value.get("name", value.get("factory")) if isinstance(value, dict) else value
        if isinstance(value, dict) and (not isinstance(name, str) or ("name" in value) == ("factory" in value)):
            raise ValueError("give name (of a task) with its options, or factory (module:task) with its args")
        if isinstance(value, dict) and "factory" in value and (unknown := set(value) - {"factory", "args"}):
            raise ValueError(f"{sorted(unknown)[0]} is not a key of it; factory goes with args alone")
        if isinstance(name, str) and ":" not in name:
            known(name, TASKS, "task")
        return value

    @model_validator(mode="after")
    def _loss_of_task(self) -> Recipe:
        if "loss" not in self.model_fields_set and self.task is not None and not self._has_classes():
            object.__setattr__(self, "loss", "task")
        return self

    def _has_classes(self) -> bool:
        name = self.task.get("name") if isinstance(self.task, dict) else self.task
        if name is None or not TASKS.is_own(name):
            return name is None
        kind = TASKS[name]
        return isinstance(kind, type) and issubclass(kind, Classification)

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        return str(check_device(value))

    @field_validator("prune")
    @classmethod
    def _names(cls, value: list[Prune]) -> list[Prune]:
        names = [p.name for p in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"name {name!r} is used twice; each pruned model needs its own")
        return value

    # -- what the names stand for ------------------------------------------------------------------------------

    def build_model(self, weights: bool = True) -> nn.Module:
        """A new model, initialised from the seed; of a pretrained one with its weights.

        Args:
            weights: whether a pretrained folder's weights are read; without them its config.json suffices.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        if self.model.factory is None:
            return (load_model if weights else new_model)(Path(self.model.source), self.model.auto)
        model = call(self.model.factory, "model", self.model.args)
        if not isinstance(model, nn.Module):
            raise UsageError(f"model.factory: {self.model.factory} returned a {type(model).__name__}, not an nn.Module")
        return model

    def build_optimizer(self, model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
        """Optimizer and learning-rate schedule over ``steps`` steps; the schedule leaves momentum and betas alone."""
        optimizer = optimizer_of(model, self.train.optimizer)
        return optimizer, scheduler_of(optimizer, steps, self.train.schedule)

    def load_loss(self) -> Callable[..., Any] | None:
        """The user's loss ``(outputs, labels) -> scalar``; None for the task's own."""
        if self.loss in OWN_LOSSES:
            return None
        found: Callable[..., Any] = load_object(self.loss, "loss")
        return found

    def load_task(self) -> Task:
        """What the model is for, with the recipe's loss; classification where the recipe does not say.

        Raises:
            UsageError: there is no such task, or it is none.
        """
        loss = self.load_loss()
        if isinstance(self.task, dict) and "factory" in self.task:
            return get_task(self.task["factory"], loss, **self.task.get("args", {}))
        if isinstance(self.task, dict):
            options = {key: value for key, value in self.task.items() if key != "name"}
            return get_task(self.task["name"], loss, **options)
        return get_task(self.task, loss)

    def load_augment(self) -> Augment | None:
        """What changes the training inputs; None for nothing."""
        name = self.train.augment
        if name is None or name in AUGMENTATIONS:
            return None if name is None else AUGMENTATIONS[name]
        found: Augment = load_object(name, "train.augment")
        return found

    def load_target(self) -> Any:
        """A target's name, or the user's function; None for the task's own."""
        target = self.score.target
        return load_object(target, "score.target") if target is not None and ":" in target else target

    def training_facts(self) -> dict[str, Any]:
        """The part that decides the trajectory."""
        facts = self.model_dump(mode="json", include={"seed", "device", "threads", "model", "data", "task", "loss", "train"})
        if self.task is None:
            del facts["task"]  # recordings that are older than this key stay what they were
        if self.model.pretrained is not None:
            del facts["model"]["pretrained"]  # a folder may move; its content is among what a recording is made from
        for place in ("path", "files", "tokenizer") if self.data is not None else ():
            facts["data"].pop(place, None)  # the samples themselves are among what a recording is made from
        if not self.train.drop_last:
            del facts["train"]["drop_last"]  # recordings that are older than this key stay what they were
        return facts

    def save(self, path: Path) -> None:
        """Writes the resolved recipe: every value, defaults included.

        Raises:
            UsageError: a recipe of the user's own lies there.
        """
        self.may_save(path)
        checkpoint.write_text(path, RESOLVED + to_yaml(self.model_dump()))

    @staticmethod
    def may_save(path: Path) -> None:
        """Raises UsageError when a file that prunekit did not write lies at ``path``."""
        try:
            ours = not os.path.lexists(path) or bounded.text(path, bounded.RECIPE).startswith(RESOLVED)
        except ArtifactError:
            ours = False
        if not ours:
            raise UsageError(f"{path}: is not a recipe that prunekit wrote and would be replaced; choose another --out")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe.

        Raises:
            UsageError: missing, not YAML, or values out of range; one line a fault, with the path of its key.
        """
        path = Path(path)
        return cls.of(_placed(read_yaml(path), path), path)

    @classmethod
    def resolved(cls, content: dict[str, Any], path: Path) -> Recipe:
        """Of the content of a file that ``save`` wrote, where a missing key means that the file is not whole.

        Raises:
            UsageError: as ``load``, or a key is missing.
        """
        recipe = cls.of(_placed(content, path), path)
        if lost := [key for key in cls.model_fields if key not in content and key != "task"]:
            raise UsageError(f"{path}: not whole, it lacks {', '.join(lost)}; run train or import again")
        return recipe


def _placed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe's content with the folders and files that it names as seen from where the recipe's file lies."""
    folder = path.absolute().parent

    def seen(section: Any, key: str, place: Callable[[Any], Any]) -> Any:
        named = section.get(key) if isinstance(section, dict) else None
        return {**section, key: place(named)} if named and isinstance(named, str | dict) else section

    def inside(named: Any) -> Any:
        return os.path.join(folder, named) if isinstance(named, str) else named

    def files(named: Any) -> Any:
        whole = isinstance(named, str) or all(isinstance(one, str) and one for one in named.values())
        return every_placed(named, folder) if whole else named

    model = seen(content.get("model"), "pretrained", inside)
    data = seen(seen(content.get("data"), "tokenizer", inside), "files", files)
    return {**content, **({"model": model} if "model" in content else {}), **({"data": data} if "data" in content else {})}
