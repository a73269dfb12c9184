"""What the options of ``prunekit prune`` say, as a recipe's ``prune`` section, and which of them are about another one.

What goes together in the section itself is checked there (``prunekit.recipe.pruning``), for recipes and options alike. Here is
checked what only flat options can get wrong: one whose section was not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunekit.errors import UsageError
from prunekit.recipe.pruning import BUDGETS, Prune, Steps
from prunekit.structure import check_structure, implied_sparsity

Options = Mapping[str, Any]
"""The parameters of ``prunekit.cli.prune`` by name; None, False or empty where the user gave none."""

DEFAULTS = {"criterion": "auto", "structure": "unstructured"}
MAKE_A_PLAN = (
    "dry_run", "refine", "refine_budget", "refine_again", "refine_tokens", "tokens", "allocation", "compensate", "layerwise",
    "classes", "ratio", "floor", "round_to", "min_units", "uniform",
)  # fmt: skip
"""Options that a finished plan leaves nothing to decide for, beside how much goes, by which criterion and in what structure."""

NAMED = {
    "finetune.epochs": "--finetune", "finetune.tokens": "--tune-tokens", "finetune.distill.weight": "--distill",
    "refine.stream.tokens": "--refine-tokens", "refine.budget": "--refine-budget", "refine.again": "--refine-again",
    "schedule.name": "--schedule", "layerwise.method": "--layerwise",
}  # fmt: skip
"""Keys of the section whose options have other names than the key's last part."""


def prune_section(options: Options) -> Prune:
    """The section that the options of a plan to be made stand for.

    Raises:
        UsageError: a value, or what was given together, does not fit; names the option.

    Example:
        >>> section = prune_section({"structure": "channels", "sparsity": 0.5, "finetune": 2})
        >>> section.name, section.finetune.epochs
        ('channels-0.5', 2.0)
    """
    asked = DEFAULTS | _given(options)
    repair, steps, structure = _repair(asked), _steps(asked), asked["structure"]
    check_structure(structure)
    content = {"criterion": asked["criterion"], "structure": structure, "refine": repair, "ratios": asked.get("ratio", {})}
    same = (
        "allocation", "floor", "round_to", "min_units", "uniform", "compensate", "layerwise", "tokens", "squeeze", "classes",
        "sparsity",
        *BUDGETS,
    )  # fmt: skip
    content |= {key: asked[key] for key in same if key in asked}
    content["name"] = asked.get("name") or _name(asked)
    return Prune.of({**steps, **content}, "prune", option=_option)


def applied_steps(options: Options) -> Steps:
    """What is still to be done with a finished plan: fine-tuning, rewinding.

    Raises:
        UsageError: as ``prune_section``; or an option that makes a plan was given.
    """
    asked = DEFAULTS | _given(options)
    if (
        any(asked.get(key) for key in MAKE_A_PLAN)
        or any(key in asked for key in ("sparsity", *BUDGETS))
        or any(asked[key] != value for key, value in DEFAULTS.items())
    ):
        raise UsageError("--apply takes a finished plan: leave out --dry-run and what makes one, such as --sparsity and --refine")
    return Steps.of(_steps(asked), "prune", option=_option)


def _given(options: Options) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _option(key: str) -> str:
    """The option that gives the value at a key's path."""
    parts = [part for part in key.split(".") if not part.isdecimal()]  # places in lists
    if parts[0] == "ratios":
        return f"--ratio {key.removeprefix('ratios.')}"
    return NAMED.get(".".join(parts)) or f"--{parts[-1].replace('_', '-')}"


def _name(asked: Options) -> str:
    """The name that a pruned model gets unasked: its structure and how much goes."""
    structure = asked["structure"]
    kind = next((key for key in ("sparsity", *BUDGETS) if key in asked), None)
    value = asked[kind] if kind else implied_sparsity(structure) or 0.0
    label = f"{value:g}" if kind in (None, "sparsity") else f"{kind.removeprefix('max_')}-{value:g}"
    layerwise = asked.get("layerwise")
    method = f"{layerwise['method'] if isinstance(layerwise, Mapping) else layerwise}-" if layerwise else ""
    return f"{method}{structure.replace(':', '-').replace('+', '-')}-{label}"


def _repair(asked: Options) -> bool | dict[str, Any] | None:
    """The key ``refine``; None leaves it to ``auto``."""
    refine, budget, again, tokens = (asked.get(key) for key in ("refine", "refine_budget", "refine_again", "refine_tokens"))
    if budget is not None and not again and refine is None and tokens is None and asked["criterion"] != "auto":
        raise UsageError("--refine-budget without --refine; unasked, only criterion auto tries to refine")
    if budget is not None and not again and refine is False:
        raise UsageError("--refine-budget with --no-refine: leave one of them out")
    if tokens is not None and refine is False:
        raise UsageError("--refine-tokens with --no-refine: leave one of them out")
    if budget is None and not again and tokens is None:
        return refine
    when = "never" if refine is False else "always" if refine or again or tokens is not None else "better"
    stream = {} if tokens is None else {"stream": {"tokens": tokens}}
    return {"when": when, "budget": budget, "again": again or 0, **stream}


def _steps(asked: Options) -> dict[str, Any]:
    """The keys of ``Steps``."""
    if "tune_tokens" in asked:
        for key in ("finetune", "rewind", "distill"):
            if key in asked:
                raise UsageError(f"--tune-tokens trains by KL to the dense model for so long; leave --{key} out")
        asked = {**asked, "distill": 1.0, "temperature": asked.get("temperature", 1.0)}
    name, soft = asked.get("schedule", "one-shot"), asked.get("distill")
    training = "finetune" in asked or "rewind" in asked or "tune_tokens" in asked
    training = training or ("tokens" in asked and any(key in asked for key in ("lr", "lora", "record_every")))
    for key in ("lr", "distill", "lora", "record_every"):
        if key in asked and not training:
            raise UsageError(
                f"--{key.replace('_', '-')} is about fine-tuning; give --finetune EPOCHS, --tune-tokens N or --rewind STEP"
            )
    if "temperature" in asked and soft is None:
        raise UsageError("--temperature is about soft labels; give --distill WEIGHT")
    if "rounds" in asked and name not in ("iterative", "gradual"):
        raise UsageError("--rounds is about pruning in steps; give --schedule iterative or gradual")
    schedule = {"name": name, "rounds": asked.get("rounds"), "every": asked.get("every")}
    steps: dict[str, Any] = {"schedule": _given(schedule)}
    steps |= {key: asked[key] for key in ("rewind", "recalibrate") if key in asked}
    if training:
        distill = None if soft is None else _given({"weight": soft, "temperature": asked.get("temperature")})
        given = {"epochs": asked.get("finetune"), "tokens": asked.get("tune_tokens"), "distill": distill}
        given |= {key: asked.get(key) for key in ("lr", "lora", "record_every")}
        steps["finetune"] = _given(given)
    return steps
