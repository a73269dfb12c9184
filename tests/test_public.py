"""What prunekit offers by name: documented, with an example that runs, and imported when it is looked at."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prunekit
from prunekit.explain import explain_part

FUNCTIONS = [name for name in prunekit.__all__ if inspect.isfunction(getattr(prunekit, name))]
CLASSES = ["OnlineInfluence", "Recorder", "Schedule"]
EXAMPLES = {name: getattr(prunekit, name) for name in [*FUNCTIONS, *CLASSES]}
EXAMPLES |= {"Trajectory.of": prunekit.Trajectory.of, "explain_part": explain_part}
PYTHON = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "schedules.md").read_text(), re.S)


@pytest.mark.parametrize("name", [name for name in prunekit.__all__ if name != "__version__"])
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(prunekit, name)
    assert name in dir(prunekit)
    if callable(found):
        summary = (inspect.getdoc(found) or "").splitlines()[0]
        assert summary.endswith((".", ":")), f"{name}: a summary ends on its first line, not {summary!r}"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_run(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (found, *_) = (t for t in doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs={}) if t.examples)
    found.globs["getfixture"] = request.getfixturevalue
    said: list[str] = []
    failed, _ = doctest.DocTestRunner().run(found, out=said.append)
    assert not failed, "".join(said)


@pytest.mark.slow
def test_the_example_of_schedules_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert PYTHON is not None
    exec(compile(PYTHON[1], "docs/schedules.md", "exec"), {})
    assert (tmp_path / "runs/b/small/model.safetensors").is_file()
    assert (tmp_path / "runs/a/child/trajectory.json").is_file()


@pytest.mark.slow
def test_importing_takes_nothing_along() -> None:
    """Neither plotting nor data libraries, nor torch before it is needed; the import path stays as it was."""
    code = (
        "import sys; before = list(sys.path); import prunekit; assert sys.path == before, sys.path\n"
        "assert 'torch' not in sys.modules\n"
        "for name in prunekit.__all__: getattr(prunekit, name)\n"
        "print(*(m for m in ('matplotlib', 'sklearn', 'jinja2', 'transformers', 'typer') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
