"""The same words everywhere: one pair for the two shares of a contribution, and one line for each word that is our own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import prunekit
from prunekit.report.glossary import GLOSSARY
from prunekit.report.html import filled

REPORT = Path(prunekit.__file__).parent / "report"
DOCS = REPORT.parents[1] / "docs"
SHOWN = sorted(path for path in REPORT.rglob("*") if path.suffix in (".j2", ".py") and path.name != "glossary.py")


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_the_shares_are_called_kernel_and_regularisation(path: Path) -> None:
    assert not re.search(r"\bby gradients\b|\bgradients \(kernel\)|weight decay and (other|whatever)|\"decay\"", path.read_text())


def test_the_docs_explain_the_words_as_pages_do() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (DOCS / "explain.md").read_text().partition("## Words")[2], re.M)
    assert dict(rows[1:]) == GLOSSARY


@pytest.mark.parametrize("path", [path for path in SHOWN if "words(" in path.read_text()], ids=lambda path: path.name)
def test_words_that_a_page_explains_are_known(path: Path) -> None:
    for asked in re.findall(r"{{ words\((.*?)\) }}", path.read_text()):
        shown = filled("{% from 'words.html.j2' import words %}{{ words(" + asked + ") }}")
        assert shown.count("<dfn>") == asked.count(",") + 1


def test_what_a_word_is_for_is_a_line() -> None:
    assert all(len(meaning) < 120 and not meaning.endswith(".") for meaning in GLOSSARY.values())
