"""Help: its panels and examples, what each form of explain takes, and what asking for it does not import."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from prunekit.cli import app
from prunekit.cli.explain.forms import FORMS
from prunekit.cli.panels import ELSEWHERE
from prunekit.verbs.explaining import KINDS
from tests.cli.conftest import Cli

TOP: Any = get_command(app)
EXPLAIN = TOP.commands["explain"]
PAGES: dict[tuple[str, ...], Any] = {(): TOP}
PAGES |= {(name,): verb for name, verb in TOP.commands.items()}
PAGES |= {("explain", name): one for name, one in EXPLAIN.forms.items()}
"""What is typed before ``--help`` -> the command whose help it is."""
EXAMPLES = [(page, job, line) for page, command in PAGES.items() if page for job, line in command.examples.items()]
PATHS = ("runs/", "recipes/", "my_module", "my-model", "model.safetensors", "first.safetensors")
HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "safetensors", "yaml", "sklearn", "jinja2", "rich")


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
def test_a_page_fits_80_columns_in_panels_and_ends_with_examples_as_they_are_typed(page: tuple[str, ...], cli: Cli) -> None:
    done = cli(*page, "--help")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    assert "..." not in done.out.partition("Commands:")[2]  # no summary is cut
    command = PAGES[page]
    if page not in ((), ("explain",)):
        assert f"\n{ELSEWHERE}:\n" not in done.out
        assert "\nRun and output:\n" in done.out
    shown = done.out.partition("\nExamples:\n")[2].replace("\\\n", " ")
    lines = [line.strip() for line in shown.splitlines()]
    typed = {job.removesuffix(":"): shlex.split(line) for job, line in pairwise(lines) if line.startswith("prunekit")}
    assert typed == {job: shlex.split(line) for job, line in command.examples.items()}
    assert typed


@pytest.mark.slow
@pytest.mark.parametrize(("page", "job", "line"), EXAMPLES, ids=[line.removeprefix("prunekit ") for *_, line in EXAMPLES])
def test_an_example_lacks_nothing_but_its_files(
    page: tuple[str, ...], job: str, line: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder it is refused for want of them, after everything else that it says has been read and checked."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert words[:2] == ["prunekit", page[0]]
    done = cli(*words[1:])
    assert done.code != 0
    assert any(path in done.err for path in PATHS), done.err
    for word in words:
        if word.startswith("recipes/"):
            assert (Path(__file__).parents[2] / word).is_file()


def test_the_panels_of_prune_are_how_much_what_repair_training_output(cli: Cli) -> None:
    shown = cli("prune", "--help").out
    heads = [line.removesuffix(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == [
        "Arguments", "How much goes: one of these", "What goes", "Repair", "Training", "Run and output", "Examples"
    ]  # fmt: skip


# -- explain RUN FORM --------------------------------------------------------------------------------------------------


def test_the_forms_are_what_can_be_explained() -> None:
    assert sorted(FORMS) == sorted(KINDS)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_has_a_help_of_its_own_options_wherever_it_is_asked_for(name: str, cli: Cli) -> None:
    asked = [cli("explain", name, "--help"), cli("explain", "RUN", name, "--help"), cli("explain", "RUN", name, "x", "-h")]
    assert {done.code for done in asked} == {0}
    assert len({done.out for done in asked}) == 1
    shown = asked[0].out
    assert shown.startswith(f"Usage: prunekit explain RUN {name} ")
    own = {option for parameter in EXPLAIN.forms[name].params for option in parameter.opts if option.startswith("--")}
    others = {o for form in EXPLAIN.forms.values() for p in form.params for o in p.opts if o.startswith("--")} - own
    options = shown.partition("\nExamples:")[0].split()
    assert own <= {*options, "--quiet"} | {word.rstrip(",") for word in options}
    lines = [line.strip() for line in shown.splitlines()]
    assert not [line for line in lines if line.startswith(tuple(f"{option} " for option in others))]


def test_explain_lists_its_forms(cli: Cli) -> None:
    for asked in (("explain", "--help"), ("explain", "RUN", "--help")):
        shown = cli(*asked).out
        listed = shown.partition("\nWhat:\n")[2].partition("\nOptions:")[0]
        assert [line.split()[0] for line in listed.splitlines() if line[2:3].strip()] == list(FORMS)
    assert "  channel GROUP [UNIT]" in shown


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("explain", "explain without a run: of what?"),
        ("explain RUN", "explain RUN: of what?"),
        ("explain sample", "the run comes first: prunekit explain RUN sample"),
        ("explain sample 12", "the run comes first: prunekit explain RUN sample"),
        ("explain RUN smaple 12", "did you mean sample?"),
        ("explain --split test RUN smaple", "did you mean sample?"),
        ("explain RUN sample 12 13", "takes no '13'; leave '13' out"),
        ("explain RUN errors --target 3", "has no --target; that is an option of explain RUN sample"),
        ("explain RUN/pruned/small --limit 3", "explain RUN pruned: has no --limit"),
    ],
)
def test_what_is_no_form_is_refused_with_what_is(typed: str, said: str, cli: Cli) -> None:
    done = cli(*typed.split())
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err


def test_a_run_may_be_called_as_a_form_is_and_options_may_come_first(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sample").mkdir()
    for typed in ("sample errors", "--split test sample errors", "sample --json errors", "--samples 3,17 sample layer"):
        assert "sample: not a run folder" in cli("explain", *typed.split()).err, typed


def test_a_shell_that_completes_is_never_refused() -> None:
    for typed in ([], ["RUN"], ["sample"], ["RUN", "smaple"], ["RUN", "sample"], ["RUN", "sample", "--no"]):
        EXPLAIN.make_context("explain", list(typed), resilient_parsing=True)


# -- what help costs ---------------------------------------------------------------------------------------------------


def test_help_imports_nothing_that_only_a_verb_needs() -> None:
    asked = [(*page, "--help") for page in PAGES]
    code = (
        "import sys\nfrom prunekit.start import main\n"
        f"for asked in {asked!r}:\n"
        "    sys.argv = ['prunekit', *asked]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert not stop.code, asked\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
