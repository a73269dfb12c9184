"""Every key of a study is in docs/comparison.md, with its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunekit.recipe.study import Repairs, Study, Tuning

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "comparison.md").read_text().split("## The keys of a study")[1]
TABLES = TEXT.split("Keys of `tune`"), TEXT.split("Keys of `refine`")
PARTS = {Study: TABLES[0][0], Tuning: TABLES[0][1].split("Keys of `refine`")[0], Repairs: TABLES[1][1]}


@pytest.mark.parametrize("section", PARTS)
def test_every_key_is_documented_with_its_default(section: type[Any]) -> None:
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.+?) \|", PARTS[section]))
    assert list(rows) == list(section.model_fields)
    for key, field in section.model_fields.items():
        if field.is_required():
            assert rows[key] == "–"
        elif (found := re.fullmatch(r"`(.+)`|null", rows[key])) and field.default != {}:
            assert (yaml.safe_load(found[1]) if found[1] else None) == field.default, key


def test_examples_of_studies_that_come_with_prunekit_load() -> None:
    for path in (DOCS.parent / "recipes").glob("*.yaml"):
        if "cases" in yaml.safe_load(path.read_text()):
            study = Study.load(path)
            assert all((path.parent / recipe).is_file() for recipe in study.cases.values())
