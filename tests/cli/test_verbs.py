"""Every verb that has a file: a help page, one line of what it does, something that prints its result."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from prunekit.cli import app, verb
from tests.cli.conftest import Cli

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = {command.callback.__module__.rpartition(".")[2]: command for command in app.registered_commands if command.callback}
VERBS = list(COMMANDS)
"""Files of ``prunekit/cli``."""


def name_of(verb: str) -> str:
    command = COMMANDS[verb]
    return command.name or command.callback.__name__  # type: ignore[union-attr]


def test_help_lists_them_as_a_run_goes(cli: Cli) -> None:
    assert len(VERBS) == len(app.registered_commands)  # a file adds one
    run = ("train", "import", "score", "compare", "prune", "eval", "report")
    assert tuple(name for name in map(name_of, VERBS) if name in run) == run
    listed = re.findall(r"^  (\w+) ", cli("--help").out.partition("Commands:")[2].partition("Examples:")[0], re.M)
    assert listed == [name_of(verb) for verb in VERBS]


def test_a_new_verb_stands_right_behind_the_one_that_it_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))
    monkeypatch.setattr(verb, "_AFTER", dict(verb._AFTER))

    @verb.verb(after="train", examples={"Somewhere": "prunekit wander"})
    def wander() -> None:
        """Go somewhere."""

    verb.put_in_order()
    names = [command.name for command in app.registered_commands]
    assert names[:3] == ["train", "wander", "import"]


def test_a_verb_follows_one_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verb._AFTER, "wander", "nowhere")
    with pytest.raises(LookupError, match="verb wander follows 'nowhere'"):
        verb.put_in_order()


def test_the_command_line_is_there_without_what_its_verbs_need() -> None:
    code = (
        "import sys\nfor name in ('torch', 'matplotlib', 'jinja2', 'sklearn', 'pydantic'): sys.modules[name] = None\n"
        "import prunekit.cli"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_its_help_and_its_file_say_what_it_does(verb: str, cli: Cli) -> None:
    done = cli(name_of(verb), "--help")
    assert done.code == 0
    assert f"prunekit {name_of(verb)} " in done.out
    summary = (import_module(f"prunekit.cli.{verb}").__doc__ or "").partition("\n")[0]
    assert summary.endswith("parses, calls, prints.")
    assert (COMMANDS[verb].callback.__doc__ or "").strip().endswith(".")  # type: ignore[union-attr]


@pytest.mark.parametrize("verb", VERBS)
def test_its_result_is_shown_and_the_readme_names_it(verb: str) -> None:
    file = Path(import_module(f"prunekit.cli.{verb}").__file__ or "")
    text = "".join(one.read_text() for one in (file.parent.glob("*.py") if file.name == "__init__.py" else [file]))
    assert "output.show(" in text
    assert f"`prunekit {name_of(verb)} " in README


@pytest.mark.parametrize("verb", VERBS)
def test_an_option_that_it_lacks_is_one_line_and_code_2(verb: str, cli: Cli) -> None:
    done = cli(name_of(verb), "--no-such-option")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
