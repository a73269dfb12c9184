"""Every structure in the table: what it finds can be pruned, and the docs and the command line name it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunekit import make_plan, masked, prune
from prunekit.explain.part import UNITS_OF
from prunekit.structure import GROUPED, STRUCTURES, Structure, check_structure, find_groups, takes_sizes
from tests.structure_models import CASES, IMAGES, random_scores

DOCS = (Path(__file__).parents[2] / "docs" / "structures.md").read_text()


@pytest.mark.parametrize("structure", GROUPED)
def test_what_it_finds_leaves_the_model_smaller_and_computing_what_the_masked_one_does(structure: str) -> None:
    """On the first two models of ``tests.structure_models.CASES`` that are its own."""
    builds = [build for kind, _, build in CASES if kind == structure][:2]
    assert builds, f"tests/structure_models.py: no model there has units of {structure}; add one to STACKED"
    for build in builds:
        torch.manual_seed(0)
        model = build().eval()
        groups = find_groups(structure, model, IMAGES)
        assert len({group.name for group in groups}) == len(groups) > 0
        plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.3, structure=structure)
        small = prune(model, plan, IMAGES)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(small(IMAGES), masked(model, plan)(IMAGES), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_is_named_wherever_structures_are(structure: str) -> None:
    check_structure(structure)
    assert f"\n| `{structure}` |" in DOCS
    if structure in GROUPED:
        kind = GROUPED[structure]
        assert isinstance(kind, Structure)
        assert kind.describes in DOCS
        assert takes_sizes(structure) == kind.sized
        assert not kind.counted or kind.sized
        assert kind.part is None or UNITS_OF[kind.part] == structure
