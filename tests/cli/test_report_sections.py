"""Every section of a run's page: drawn for a whole run, left out of a bare one, and nothing of a run's text is markup."""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import prunekit
from prunekit.report import OVERVIEW, SECTIONS, RunArtifacts, write_page
from prunekit.report.html import filled
from prunekit.verbs.reporting import run_artifacts
from prunekit.verbs.run_folder import Run

PACKAGE = Path(prunekit.__file__).parent
OF_EVERY_RUN = {"provenance"}
WITH_TEXTS = {"pruned_models", "kernel_account", "comparison", "provenance"}
"""Sections that show texts of a run, not numbers and pictures alone."""
LOOKED_UP = {"measures", "figures", "what"}
"""Fields whose texts are names that prunekit gave."""


@pytest.fixture(scope="module")
def whole(finished: Path) -> RunArtifacts:
    found = run_artifacts(Run(finished))
    assert found.left_out == []
    return found


@pytest.fixture(scope="module")
def bare(whole: RunArtifacts) -> RunArtifacts:
    """Trained, or imported, and pruned; nothing measured."""
    return RunArtifacts(path=whole.path, recipe=whole.recipe, has_data=True, trajectory=whole.trajectory, pruned=whole.pruned)


def sections_of(page: Path) -> dict[str, str]:
    """What stands below each heading: of overviews open, of sections folded."""
    return dict(re.findall("<h2>(.*?)</h2>(.*?)(?=<h2>|</main>)", page.read_text(), re.S))


def test_a_whole_run_has_every_section_in_the_tables_order(finished: Path, whole: RunArtifacts) -> None:
    drawn = sections_of(finished / "report.html")
    overview = ["In short", "Accuracy against size", "Pruned models"]
    assert len(overview) == len(OVERVIEW)
    assert list(drawn) == [*overview, *(section.title for section in SECTIONS.values())]
    for text in drawn.values():
        assert re.sub("<[^>]*>", "", text).strip()
    assert [line for section in SECTIONS.values() for line in section.missing(whole)] == []


@pytest.mark.parametrize("name", SECTIONS)
def test_a_bare_run_lacks_it_and_says_what_adds_it(name: str, bare: RunArtifacts, tmp_path: Path) -> None:
    section = SECTIONS[name]
    assert (section.values(bare) is None) == (name not in OF_EVERY_RUN)
    missing = write_page(tmp_path / "report.html", [bare])
    assert (section.title in sections_of(tmp_path / "report.html")) == (name in OF_EVERY_RUN)
    for line in section.missing(bare):
        assert re.fullmatch(rf"no .+; prunekit \w+ {re.escape(str(bare.path))}.* adds it", line)
        assert line in missing
        assert f"Not here yet: {line}" in html.unescape((tmp_path / "report.html").read_text())


def test_what_a_bare_run_lacks_is_told_only_where_a_command_can_add_it(bare: RunArtifacts, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    told = [line.partition(";")[0] for line in write_page(page, [bare])]
    assert told == [*(f"no evaluation of {name}" for name in bare.pruned), "no timeline of training"]
    imported = replace(bare, trajectory={**bare.trajectory, "steps": 0})
    assert [line.partition(";")[0] for line in write_page(page, [imported])] == told[:-1]
    assert write_page(page, [replace(bare, has_data=False)]) == []
    assert "Not here yet" not in page.read_text()


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if section.reads])
def test_a_damaged_artifact_of_its_own_is_left_out_by_name(name: str, run: Path) -> None:
    section = SECTIONS[name]
    for kind, place in section.reads.items():
        assert kind.load(run / place)
        (run / place).write_text("{")
        found = run_artifacts(Run(run))
        assert [line.partition(":")[0] for line in found.left_out] == [str(run / place)]
        assert found.one(kind) is None
        assert section.values(found) is None or name in OF_EVERY_RUN


def test_an_artifact_lies_in_one_place() -> None:
    places = {(kind, place) for section in SECTIONS.values() for kind, place in section.reads.items()}
    assert len(places) == len({kind for kind, _ in places})


def hostile(value: Any) -> Any:
    """The same with markup in every text that is shown and not looked up."""
    if isinstance(value, str):
        return value and f"{value}<b>"
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: hostile(getattr(value, f.name)) for f in fields(value) if f.name not in LOOKED_UP})
    if isinstance(value, Mapping):
        return {key: inner if key in LOOKED_UP else hostile(inner) for key, inner in value.items()}
    return [hostile(inner) for inner in value] if isinstance(value, list | tuple) else value


@pytest.mark.slow  # draws every picture
@pytest.mark.parametrize("name", SECTIONS)
def test_a_runs_texts_are_escaped(name: str, whole: RunArtifacts) -> None:
    marked = hostile(whole)
    marked = replace(marked, evaluations={f"<b>{model}": found for model, found in marked.evaluations.items()})
    values = SECTIONS[name].values(marked)
    assert values is not None
    drawn = filled(SECTIONS[name].template, **values)
    assert "<b>" not in drawn
    assert "&lt;b&gt;" in drawn or name not in WITH_TEXTS


@pytest.mark.slow  # draws a picture
@pytest.mark.parametrize("name", OVERVIEW)
def test_texts_of_an_overview_are_escaped(name: str, whole: RunArtifacts) -> None:
    marked = replace(hostile(whole), path=whole.path / "<b>", called="a <b>run")
    evaluations = {f"<b>{model}": found for model, found in list(marked.evaluations.items())[:1]}
    marked = replace(marked, evaluations=evaluations, pruned={f"<b>{model}": m for model, m in marked.pruned.items()})
    values = OVERVIEW[name].values([marked, replace(marked, called="another <b>run")])
    assert values is not None
    drawn = filled(OVERVIEW[name].title, **values) + filled(OVERVIEW[name].template, **values)
    assert "<b>" not in re.sub("<b>([^<]*)</b>", r"\1", drawn)
    assert "&lt;b&gt;" in drawn or name == "size_figure"


def test_templates_escape_and_are_in_the_package() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in (PACKAGE / "report").rglob("*.j2")}
    for text in (*files.values(), *(part.template for part in (*OVERVIEW.values(), *SECTIONS.values()))):
        assert re.search(r"\|\s*safe|autoescape", text) is None
    patterns = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["prunekit"]
    packed = {path.relative_to(PACKAGE).as_posix() for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert set(files) <= packed
