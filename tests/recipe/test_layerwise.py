"""The recipe's key ``layerwise``, and what does not go with it, said to recipes and to options alike."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit import UsageError
from prunekit.recipe import Prune, prune_section


def section(**content: Any) -> Prune:
    return Prune.of({"name": "p", "layerwise": "sparsegpt", **content}, "r.yaml")


def test_a_name_is_short_for_a_section() -> None:
    short, long = section(structure="2:4"), section(structure="2:4", layerwise={"method": "sparsegpt", "samples": 256})
    assert short == long
    assert short.layerwise is not None
    assert short.layerwise.options() == {"method": "sparsegpt", "within": None, "damping": 0.01, "activations": 2**31}
    assert short.repair is None  # criterion is auto, and there is nothing to choose


def test_refining_is_asked_for_or_not_at_all() -> None:
    asked = section(sparsity=0.5, refine=True)
    assert asked.repair is not None
    with pytest.raises(UsageError, match="refine goes with layerwise as true or false"):
        section(sparsity=0.5, refine={"when": "better"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"criterion": "magnitude", "structure": "2:4"},
            "and 2:4 keeps as much everywhere; leave it out",
        ),
        ({"schedule": {"name": "iterative"}, "sparsity": 0.5}, "leave schedule out"),
        ({"rewind": 3, "sparsity": 0.5}, "leave rewind out"),
        ({"finetune": {"epochs": 1}, "refine": {"again": 1}, "sparsity": 0.5}, "leave again out"),
        ({"compensate": True, "sparsity": 0.5}, "leave compensate out"),
        ({"allocation": "rows", "sparsity": 0.5}, "name a criterion beside allocation"),
        ({"max_params": 1000}, "leave max_params out"),
        ({"structure": "channels", "sparsity": 0.5}, "layer-wise methods remove single weights"),
        ({"structure": "2:4", "sparsity": 0.6}, "2:4 removes 0.5"),
        ({"structure": "2:4", "layerwise": {"method": "admm", "within": "layer"}}, "2:4 keeps as much in every row"),
        ({"layerwise": "sparsgpt", "sparsity": 0.5}, "layer-wise method 'sparsgpt' does not exist; did you mean sparsegpt"),
        ({"layerwise": {"method": "admm", "activations": "lots"}, "sparsity": 0.5}, "'lots' is no amount of memory"),
        ({}, "needs a sparsity"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        section(**content)


def test_options_are_named_as_options() -> None:
    with pytest.raises(UsageError, match="leave --ratio out"):
        prune_section({"layerwise": "wanda", "sparsity": 0.5, "ratio": {"conv1*": 0.3}})
    with pytest.raises(UsageError, match="give --criterion beside --allocation"):
        prune_section({"layerwise": "wanda", "sparsity": 0.5, "allocation": "erk"})
    with pytest.raises(UsageError, match="--criterion says beside --layerwise how much of each layer goes"):
        prune_section({"layerwise": "wanda", "structure": "2:4", "criterion": "kfac"})
    assert prune_section({"layerwise": "wanda", "structure": "2:4"}).name == "wanda-2-4-0.5"


def test_rows_are_for_single_weights() -> None:
    assert Prune.of({"name": "p", "criterion": "wanda", "allocation": "rows", "sparsity": 0.5}, "r.yaml").allocation == "rows"
    with pytest.raises(UsageError, match="compares single weights within an output, and the structure is channels"):
        Prune.of({"name": "p", "allocation": "rows", "structure": "channels", "sparsity": 0.5}, "r.yaml")
