"""Every verb in the table: a help page with an example, one line of what it does, something that prints its result."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from prunekit.cli import VERBS, app
from prunekit.report.terminal import SHOW
from tests.cli.conftest import Cli

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = {command.callback.__module__.rpartition(".")[2]: command for command in app.registered_commands if command.callback}


def name_of(verb: str) -> str:
    command = COMMANDS[verb]
    return command.name or command.callback.__name__  # type: ignore[union-attr]


def test_every_file_adds_one_verb() -> None:
    assert list(COMMANDS) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_its_help_has_an_example_of_it(verb: str, cli: Cli) -> None:
    name = name_of(verb)
    done = cli(name, "--help")
    assert done.code == 0
    assert f"prunekit {name}" in " ".join(done.out.split())
    epilog = COMMANDS[verb].epilog or ""
    first = re.search(r"prunekit .*?(?=;|$)", epilog)
    assert first is not None
    assert shlex.split(first[0])[1] == name
    summary = (import_module(f"prunekit.cli.{verb}").__doc__ or "").partition("\n")[0]
    assert summary.endswith("parses, calls, prints.")
    assert (COMMANDS[verb].callback.__doc__ or "").strip().endswith(".")  # type: ignore[union-attr]


@pytest.mark.parametrize("verb", VERBS)
def test_its_result_is_shown_and_the_readme_names_it(verb: str) -> None:
    text = Path(import_module(f"prunekit.cli.{verb}").__file__ or "").read_text()
    shown = re.findall(r'\.show\("(\w+)"', text)
    assert shown or "output.show," in text  # run hands it to its steps
    assert set(shown) <= set(SHOW)
    assert f"`prunekit {name_of(verb)} " in README


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_that_it_lacks_is_one_line_and_code_2(verb: str, cli: Cli) -> None:
    done = cli(name_of(verb), "--no-such-option")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
