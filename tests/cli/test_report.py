"""report draws what run folders hold: no model, no data; headline, picture and table first, the rest folded."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Cli, with_recipe

SECTIONS = (
    "In short", "Accuracy against size", "Pruned models", "what came back, and the samples that asked for it",
    "The kernel's account", "Training, seen along its own time", "Sample by sample", "Criteria compared", "Where it comes from",
)  # fmt: skip


@pytest.mark.usefixtures("short")
def test_a_run_whose_modules_are_gone_is_reported_whole(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "magnitude", "-s", 0.9, "--refine", "--name", "better")
    assert done.code == 0, done.err
    assert cli("eval", run / "pruned" / "better").code == 0
    assert json.loads(cli("report", run, "--json").out)["missing"] == []
    page, recipe = (run / "report.html").read_text(), (run / "recipe.yaml").read_text()
    assert [section for section in SECTIONS if section.lower() not in page.lower()] == []
    parts = {part: {**yaml.safe_load(recipe)[part], "factory": "a_module_that_is_gone:build"} for part in ("model", "data")}
    with_recipe(run, **parts)
    assert cli("score", run, "-c", "magnitude").code == 2
    done = cli("report", run, "--json")
    assert (done.code, done.err) == (0, "")
    assert {**json.loads(done.out), "path": ""} == {"path": "", "left_out": [], "missing": []}
    drawn = (run / "report.html").read_text()
    assert drawn.split("The resolved recipe")[0] == page.split("The resolved recipe")[0]


def test_what_is_missing_is_told_with_the_command_that_adds_it(run: Path, cli: Cli) -> None:
    (run / "timeline.json").unlink()
    (run / "pruned" / "small" / "eval.json").unlink()
    done = cli("report", run)
    assert done.code == 0
    assert f"report: no evaluation of small; prunekit eval {run / 'pruned' / 'small'} adds it\n" in done.out
    assert f"report: no timeline of training; prunekit eval {run / 'pruned' / 'loose'} adds it\n" in done.out
    assert "Not here yet: no timeline of training" in (run / "report.html").read_text()
    assert cli("eval", run / "pruned" / "small").code == 0
    assert json.loads(cli("report", run, "--json").out)["missing"] == []


VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A page's elements in order; its tags must be closed in the order in which they were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop(), (tag, self.getpos())

    def all(self, tag: str, key: str) -> list[str]:
        """What an attribute of all elements of a tag holds."""
        return [str(attributes[key]) for name, attributes, _ in self.elements if name == tag and key in attributes]


@pytest.fixture
def two(run: Path, tmp_path: Path) -> Path:
    """Another run, where ``small`` waits for its evaluation."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "pruned" / "small" / "eval.json").unlink()
    return other


def test_what_stands_open_comes_first_and_the_contents_lead_everywhere(run: Path, two: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("report", run).code == 0
    assert cli("report", run, two, "--out", tmp_path / "both.html").code == 0
    for path in (run / "report.html", tmp_path / "both.html"):
        page = Page(path)
        places = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
        assert len(set(places)) == len(places)
        links = [address[1:] for address in page.all("a", "href")]
        expected = [place for place in places if place != "run-1" or path.name == "both.html"]
        assert links == [*expected, *expected]  # beside the page, and folded above it
        assert places[:3] == ["headlines", "size_figure", "models"]
        folded = [place for place in places if re.fullmatch("run-[0-9]+-.*", str(place))]
        assert page.all("details", "id") == folded
        assert not any("open" in attributes for tag, attributes, _ in page.elements if tag == "details")


def test_a_page_loads_nothing_and_its_policy_lets_its_own_script_alone_run(run: Path, cli: Cli) -> None:
    assert cli("report", run).code == 0
    page, text = Page(run / "report.html"), (run / "report.html").read_text()
    assert all(address.startswith("data:image/png;base64,") for address in page.all("img", "src"))
    assert all(address.startswith("#") for address in page.all("a", "href"))
    assert page.all("img", "alt").count("") == 0
    (script,) = re.findall("<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [content for content in page.all("meta", "content") if "default-src" in content]
    assert "default-src 'none'" in policy
    assert re.findall("script-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert not {name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")}


def test_wide_things_stay_in_their_own_box(run: Path, cli: Cli) -> None:
    assert cli("report", run).code == 0
    text = (run / "report.html").read_text()
    assert text.count('<div class="scroll"><table') == text.count("<table")
    assert "img { max-width: 100%; height: auto; }" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_a_model_that_waits_for_its_evaluation_is_listed_with_the_command(two: Path, cli: Cli) -> None:
    assert cli("report", two).code == 0
    text = html.unescape((two / "report.html").read_text())
    command = f"<code>prunekit eval {two / 'pruned' / 'small'}</code>"
    assert f'<p class="waiting"><b>small</b> is pruned and not evaluated yet: {command}' in text
    assert re.search(
        rf'<td class="name" data-value="small">small<small>.*channels</small></td><td[^>]*>not evaluated yet: {command}', text
    )
    for evaluation in two.rglob("eval.json"):
        evaluation.unlink()
    assert cli("report", two).code == 0
    text = (two / "report.html").read_text()
    assert text.count("is pruned and not evaluated yet") == 2
    assert "against size" not in text


def test_several_runs_side_by_side(run: Path, two: Path, cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    before = (run / "report.html").read_text()
    done = cli("report", run, two, "--out", page, "--json")
    assert done.code == 0, done.err
    missing = f"no evaluation of small; prunekit eval {two / 'pruned' / 'small'} adds it"
    assert json.loads(done.out) == {"path": str(page), "left_out": [], "missing": [missing]}
    assert (run / "report.html").read_text() == before
    text = page.read_text()
    assert "<h1>2 runs</h1>" in text
    assert re.findall("<h2>(.*?)</h2>", text)[-2:] == ["run", "other"]
    (table,) = re.findall('<table class="sortable">(.*?)</table>', text, re.S)
    heads = re.findall("<th[^>]*>(.*?)</th>", table)
    rows = [re.findall('data-value="([^"]*)"', row) for row in re.findall("<tr>(.*?)</tr>", table, re.S)[1:]]
    assert [row[:2] for row in rows] == [
        ["run", "dense"], ["run", "loose"], ["run", "small"], ["other", "dense"], ["other", "loose"], ["other", "small"]
    ]  # fmt: skip
    for row in rows[:-1]:
        assert len(row) == len(heads)
        assert all(value == "" or float(value) is not None for value in row[2:])
    assert len(rows[-1]) == 2
    assert cli("report", run, two, "--out", page).code == 0  # a page of prunekit's is written again


def test_runs_of_one_name_are_told_apart_by_their_paths(run: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(run, tmp_path / "b" / "run")
    assert cli("report", run, tmp_path / "b" / "run", "--out", tmp_path / "both.html").code == 0
    names = re.findall("<h2>(.*?)</h2>", (tmp_path / "both.html").read_text())[-2:]
    assert names == [str(run), str(tmp_path / "b" / "run")]


def test_what_cannot_be_a_page_is_refused_before_anything_is_read(run: Path, two: Path, cli: Cli, tmp_path: Path) -> None:
    foreign = tmp_path / "mine.html"
    foreign.write_text("<p>mine")
    for arguments, said in (
        ((run, two), "several runs need --out PAGE.html"),
        ((run, run / ".", "--out", tmp_path / "a.html"), "is given twice"),
        ((run, two, "--out", tmp_path / "folder"), "it must be the page to write, such as"),
        ((run, two, "--out", tmp_path / "none" / "a.html"), f"there is no folder {tmp_path / 'none'}"),
        ((run, two, "--out", foreign), "which is there and no page of prunekit's"),
        ((run, tmp_path / "gone", "--out", tmp_path / "a.html"), str(tmp_path / "gone")),
    ):
        done = cli("report", *arguments)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert said in done.err
    assert foreign.read_text() == "<p>mine"
    assert not (tmp_path / "a.html").exists()
