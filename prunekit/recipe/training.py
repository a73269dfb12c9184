"""Sections of a recipe on how weights are trained: optimizer, rate, fine-tuning, distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from prunekit.recipe.values import Count, Positive, Section, Share, Tokens, without_unset


class Optimizer(Section):
    """``betas`` are for adam and adamw, ``momentum`` and ``nesterov`` for sgd."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    momentum: Share = 0.0
    nesterov: bool = False

    @model_validator(mode="after")
    def _belongs(self) -> Optimizer:
        foreign = {"betas"} if self.name == "sgd" else {"momentum", "nesterov"}
        given = {k for k in foreign & self.model_fields_set if getattr(self, k) != type(self).model_fields[k].default}
        if given:
            raise ValueError(f"{', '.join(sorted(given))} is not an option of {self.name}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


class RateSchedule(Section):
    """``onecycle`` rises to the optimizer's lr over ``warmup`` of the steps and falls to near 0; ``triangular`` does so from 0

    to 0 along straight lines.
    """

    name: Literal["onecycle", "triangular", "cosine", "constant"] = "onecycle"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.2


class Distill(Section):
    """Soft labels from the dense model: see ``prunekit.training.Distillation``."""

    temperature: Annotated[float, Field(ge=0.01, le=10**6, allow_inf_nan=False)] = 4.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5


class Finetune(Section):
    """``epochs`` of each round; below 1, a share of the dense training's; null, as many as that had. ``tokens`` in their place

    (without tokens, samples): so many are trained on, such as ``500k``, in whole steps.

    ``lr``, ``optimizer`` and ``schedule`` (of the rate) are the dense training's where they are null, ``seed`` is the recipe's;
    of a model whose training is not known ``lr`` is searched for (docs/schedules.md).

    ``lora``: train matrices of this rank beside the layers' weights in the place of the whole model (docs/schedules.md).

    ``record_every``: so many steps lie between two states that are kept of it; null: as of the dense training.
    """

    epochs: Positive | None = None
    tokens: Tokens | None = None
    lr: Positive | None = None
    optimizer: Optimizer | None = None
    schedule: RateSchedule | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    distill: Distill | None = None
    lora: Count | None = None
    record_every: Count | None = None

    _said = without_unset("tokens", "lora", "record_every")

    @field_validator("epochs")
    @classmethod
    def _epochs(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != round(value):
            raise ValueError("write a whole number, or a share of the dense training's epochs below 1")
        return value

    @model_validator(mode="after")
    def _one(self) -> Finetune:
        if self.epochs is not None and self.tokens is not None:
            raise ValueError("epochs and tokens are given; one of them decides how long it takes")
        return self
