"""What only some need: without it the verbs that do not need it work, and the others say what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import sys
for name in {names!r}: sys.modules[name] = None
sys.argv = ["prunekit", *{arguments!r}]
from prunekit.cli import main
main()
"""


def without(names: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(names=names, arguments=[str(argument) for argument in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_draws_says_what_to_install(missing: str, tmp_path: Path) -> None:
    done = without([missing], "report", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"prunekit: this needs {missing}, which is not installed; pip install 'prunekit[report]'\n"


@pytest.mark.slow
def test_the_digits_say_what_to_install(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "digits-mlp.yaml"
    done = without(["sklearn"], "train", recipe, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "this needs sklearn, which is not installed; pip install 'prunekit[digits]'" in done.stderr


@pytest.mark.slow
def test_training_scoring_and_pruning_need_none_of_it() -> None:
    """The verbs' own modules import without plots, pages and data of the demo."""
    code = (
        "import sys\nfor name in ('matplotlib', 'jinja2', 'sklearn'): sys.modules[name] = None\n"
        "from prunekit.verbs import evaluating, info, pruning, scheduling, scoring, training\n"
        "from prunekit.report.terminal import comparing, evaluating, explaining, pruning, training"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
