"""README's own example, run as it is written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks(marker: str) -> list[tuple[str, str]]:
    """``(marker's argument, code)`` of every block that follows ``<!-- marker… -->``."""
    return re.findall(rf"<!-- {marker}([^>]*?) -->\n```\w+\n(.*?)```", README.read_text(), re.S)


def test_own_model_example_runs(tmp_path: Path) -> None:
    for name, code in blocks("file: "):
        (tmp_path / name).write_text(code)
    assert {p.name for p in tmp_path.iterdir()} == {"my_module.py", "mine.yaml"}
    ((_, commands),) = blocks("run")
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert program == "prunekit"
        done = subprocess.run([sys.executable, "-m", "prunekit", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    examples = blocks("python")
    assert len(examples) == 3
    for _, code in examples:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_verb_and_every_room_is_named() -> None:
    text = README.read_text()
    import prunekit
    from prunekit.cli import app

    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"`prunekit {name} " in text, name
    for room in Path(prunekit.__file__).parent.iterdir():
        if room.is_dir() and (room / "__init__.py").exists():
            assert f"{room.name}/" in text, room.name
