"""Scores of a product or of a mean of ranks, from the scores of their parts; nothing is scored again."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from prunekit.criteria.group_scores import mean_ranks, power_product
from prunekit.criteria.scores import Scores
from prunekit.criteria.spec import Product, Rank, Single, product
from prunekit.errors import ArtifactError

SAME = ("trajectory", "model", "prunable")


def compose(spec: Single | Product | Rank, singles: Mapping[str, Scores]) -> Scores:
    """The scores that ``spec`` names.

    Weights: ``Π_k I_k^{p_k}``, or the mean of the ranks among all prunable weights, in (0, 1), equal importances sharing
    theirs. Groups: the same of the parts' *group* scores, so the parts are kept whole inside (see ``Scores.parts``). A
    factor of 0 makes a product 0; exponents are above 0, so ``0^0`` does not arise.

    Args:
        singles: scores by canonical text, for every one in ``spec.singles``.

    Raises:
        ArtifactError: the parts were made from different trajectories, weights or prunable parameters.
    """
    if isinstance(spec, Single):
        return singles[spec.text]
    facts: dict[str, Any] = {"criterion": spec.text, "group": "product", "aggregation": None}
    if isinstance(spec, Product):
        parts = tuple(singles[part.text] for part, _ in spec.factors)
        facts["powers"] = [float(power) for _, power in spec.factors]
        _check_same(spec.text, parts)
        importance = {
            name: power_product([part.importance[name] for part in parts], facts["powers"]) for name in parts[0].importance
        }
    else:
        parts = tuple(compose(part, singles) for part in spec.parts)
        facts["group"] = "rank"
        _check_same(spec.text, parts)
        importance = mean_ranks([{name: part.importance[name] for name in parts[0].importance} for part in parts])
    facts |= {key: parts[0].provenance[key] for key in (*SAME, "kept") if key in parts[0].provenance}
    facts["parts"] = [{"criterion": part.criterion, "digest": part.digest} for part in parts]
    return Scores(_compact(importance, parts[0]), {}, facts, _findings(parts), _cost(spec, singles), parts)


def temper(scores: Scores, magnitudes: Scores, p: float) -> Scores:
    """``I^p · |θ|^(1-p)``: ``p`` says how far to trust ``scores``.

    ``p = 0`` is ``magnitudes`` itself and ``p = 1`` is ``scores`` itself: the other one leaves no trace, not even of its
    zeros.

    Args:
        scores: of any criterion but a mean of ranks.
        magnitudes: scores of ``magnitude``, for the same weights.
        p: in [0, 1].

    Raises:
        ValueError: ``p`` is outside.
        ArtifactError: made from different weights, or ``scores`` are a mean of ranks.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must be in [0, 1]")
    if scores.provenance["group"] == "rank":
        raise ArtifactError(f"temper: {scores.criterion} is a mean of ranks, which has no powers")
    _check_same("temper", (scores, magnitudes))
    inside = [(scores, 1.0)]
    if scores.provenance["group"] == "product":
        inside = list(zip(scores.parts, scores.provenance["powers"], strict=True))
    whole = product((Single.of(part.criterion), Decimal(str(power))) for part, power in inside)
    singles = {part.criterion: part for part, _ in inside} | {magnitudes.criterion: magnitudes}
    power = Decimal(str(p))
    return compose(product([(whole, power), (Single.of(magnitudes.criterion), 1 - power)]), singles)


def _check_same(name: str, parts: tuple[Scores, ...]) -> None:
    first = parts[0]
    for part in parts[1:]:
        for key in SAME:
            if part.provenance[key] != first.provenance[key]:
                raise ArtifactError(
                    f"{name}: scores of {first.criterion} and of {part.criterion} were made from different {key} "
                    f"({first.provenance[key]}, {part.provenance[key]}); score them again with --overwrite"
                )
    of = {part.structure: part.criterion for part in parts if part.structure is not None}
    if len(of) > 1:
        said = " and ".join(f"{criterion} scores {structure}" for structure, criterion in of.items())
        raise ArtifactError(f"{name}: {said}; scores of different structures cannot be composed")


def _compact(importance: dict[str, Tensor], like: Scores) -> dict[str, Tensor]:
    """In the parts' own precision, unless that would lose a weight to overflow or to 0."""
    small = {name: tensor.to(like.importance[name].dtype) for name, tensor in importance.items()}
    safe = all(bool(torch.isfinite(t).all()) and torch.equal(t == 0, importance[name] == 0) for name, t in small.items())
    return small if safe else importance


def _findings(parts: tuple[Scores, ...]) -> dict[str, Any]:
    """The largest error of a part, every weight that some part found untouched, and what some part scored by magnitude."""
    errors = [part.findings["error"] for part in parts if part.findings.get("error")]
    uncovered: dict[str, int] = {}
    for part in parts:
        for name, count in part.findings.get("uncovered", {}).items():
            uncovered[name] = max(count, uncovered.get(name, 0))
    found: dict[str, Any] = {"error": max(errors, key=lambda error: error["relative"])} if errors else {}
    plain = {part.criterion: part.findings["by_magnitude"] for part in parts if part.findings.get("by_magnitude")}
    if plain:
        found["by_magnitude"] = {
            "parameters": {name: why for each in plain.values() for name, why in each["parameters"].items()},
            "scale": next(iter(plain.values()))["scale"],
        }
    return found | ({"uncovered": uncovered} if any("uncovered" in part.findings for part in parts) else {})


def _cost(spec: Product | Rank, singles: Mapping[str, Scores]) -> dict[str, Any]:
    costs = [singles[part.text].cost for part in spec.singles]
    return {
        "seconds": round(sum(cost.get("seconds", 0.0) for cost in costs), 3),
        "peak_mb": max(cost.get("peak_mb", 0) for cost in costs),
        "gradient_evaluations": sum(cost.get("gradient_evaluations", 0) for cost in costs),
    }
