"""Options of prune and a recipe's ``prune`` section: the same section for the same wish, and one check with two wordings."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit import UsageError
from prunekit.recipe import Prune, Steps, applied_steps, prune_section

WISHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sparsity": 0.5}, {"name": "unstructured-0.5", "sparsity": 0.5}),
    ({"structure": "2:4"}, {"name": "2-4-0.5", "structure": "2:4"}),
    ({"max_params": 900, "structure": "channels"}, {"name": "channels-params-900", "max_params": 900, "structure": "channels"}),
    ({"sparsity": 0.5, "ratio": {"a*": 0.2}, "name": "x"}, {"name": "x", "sparsity": 0.5, "ratios": {"a*": 0.2}}),
    ({"sparsity": 0.5, "refine": False, "name": "x"}, {"name": "x", "sparsity": 0.5, "refine": False}),
    ({"sparsity": 0.5, "refine_budget": "9s", "name": "x"},
     {"name": "x", "sparsity": 0.5, "refine": {"when": "better", "budget": "9s"}}),
    ({"sparsity": 0.5, "refine_again": 2, "finetune": 1, "name": "x"},
     {"name": "x", "sparsity": 0.5, "refine": {"again": 2}, "finetune": {"epochs": 1}}),
    ({"sparsity": 0.5, "schedule": "gradual", "every": 3, "rounds": 2, "finetune": 1, "lr": 0.1, "name": "x"},
     {"name": "x", "sparsity": 0.5, "schedule": {"name": "gradual", "every": 3, "rounds": 2},
      "finetune": {"epochs": 1, "lr": 0.1}}),
    ({"sparsity": 0.5, "rewind": 3, "distill": 0.2, "temperature": 2, "name": "x"},
     {"name": "x", "sparsity": 0.5, "rewind": 3, "finetune": {"distill": {"weight": 0.2, "temperature": 2}}}),
    ({"sparsity": 0.5, "refine_tokens": "64k", "tune_tokens": "1.5M", "lr": 0.1, "name": "x"},
     {"name": "x", "sparsity": 0.5, "refine": {"stream": {"tokens": 64000}},
      "finetune": {"tokens": 1500000, "lr": 0.1, "distill": {"weight": 1.0, "temperature": 1.0}}}),
    ({"sparsity": 0.5, "finetune": 2, "lora": 8, "name": "x"},
     {"name": "x", "sparsity": 0.5, "finetune": {"epochs": 2, "lora": 8}}),
    ({"sparsity": 0.5, "tune_tokens": "1.5e5", "name": "x"},
     {"name": "x", "sparsity": 0.5, "finetune": {"tokens": 150000, "distill": {"weight": 1.0, "temperature": 1.0}}}),
    ({"sparsity": 0.5, "tokens": "90k", "lora": 8, "name": "x"},
     {"name": "x", "sparsity": 0.5, "tokens": 90000, "finetune": {"lora": 8}}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "section"), WISHES)
def test_options_and_keys_that_wish_the_same_are_one_section(options: dict[str, Any], section: dict[str, Any]) -> None:
    unasked = dict.fromkeys(("lr", "rounds", "max_macs", "refine_budget", "allocation"))
    assert prune_section({**unasked, "dry_run": False, **options}) == Prune.of(section, "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "by_option", "section", "by_key"),
    [
        ({"sparsity": 0.5, "every": 3}, "--every is about pruning while training; give --schedule gradual",
         {"sparsity": 0.5, "schedule": {"every": 3}}, "r.yaml: every is about schedule gradual, not one-shot"),
        ({"sparsity": 0.5, "refine": False, "refine_again": 1}, "--refine-again with --no-refine: leave one of them out",
         {"sparsity": 0.5, "refine": {"when": "never", "again": 1}}, "again goes with when: always, not never"),
        ({}, "prune needs --sparsity, a budget such as --max-params, or --apply PLAN",
         {}, "r.yaml: structure 'unstructured' needs a sparsity"),
        ({"sparsity": 0.5, "refine_tokens": "5k", "refine": False}, "--refine-tokens with --no-refine: leave one of them out",
         {"sparsity": 0.5, "refine": {"stream": {"tokens": 5000}, "rounds": 3}}, "rounds is for samples that are kept"),
        ({"sparsity": 0.5, "tune_tokens": "5k", "finetune": 1},
         "--tune-tokens trains by KL to the dense model for so long; leave --finetune out",
         {"sparsity": 0.5, "finetune": {"tokens": "many"}}, "'many' is no number of tokens; write for example 500k or 1.5M"),
        ({"sparsity": 0.5, "lora": 8}, "--lora is about fine-tuning; give --finetune EPOCHS, --tune-tokens N or --rewind STEP",
         {"sparsity": 0.5, "finetune": {"lora": 0}}, "lora is 0"),
        ({"sparsity": 0.5, "finetune": float("inf")}, "--finetune is inf: it should be a finite number",
         {"sparsity": 0.5, "finetune": {"epochs": float("inf")}}, "r.yaml: finetune.epochs is inf: it should be a finite number"),
        ({"sparsity": 0.5, "finetune": 1, "distill": 1, "temperature": 0},
         "--temperature is 0: it should be greater than or equal to 0.01",
         {"sparsity": 0.5, "finetune": {"distill": {"temperature": 0}}}, "r.yaml: finetune.distill.temperature is 0"),
        ({"sparsity": 0.5, "ratio": {"a.0.b": 2}}, "--ratio a.0.b is 2: it should be less than 1",
         {"sparsity": 0.5, "ratios": {"a.0.b": 2}}, "r.yaml: ratios.a.0.b is 2"),
        ({"sparsity": 0.5, "lora": 8, "rewind": 3}, "--rewind trains on as the dense training did; leave --lora out",
         {"sparsity": 0.5, "rewind": 3, "finetune": {"lora": 8}}, "leave out finetune.lora"),
    ],
)  # fmt: skip
def test_one_check_names_the_option_or_the_key(
    options: dict[str, Any], by_option: str, section: dict[str, Any], by_key: str
) -> None:
    with pytest.raises(UsageError) as told:
        prune_section(options)
    assert str(told.value) == by_option
    with pytest.raises(UsageError) as told:
        Prune.of({"name": "x", **section}, "r.yaml")
    assert by_key in str(told.value)


def test_a_finished_plan_takes_what_comes_after_it() -> None:
    assert applied_steps({"finetune": 1, "sparsity": None, "refine": False}) == Steps.of({"finetune": {"epochs": 1}}, "r.yaml")
    for made in ({"sparsity": 0.0}, {"max_drop": 1.0}, {"floor": 0.1}, {"criterion": "taylor"}, {"ratio": {"a": 0.1}}):
        with pytest.raises(UsageError, match="--apply takes a finished plan"):
            applied_steps(made)
