"""README's own example, run as it is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.zoo.operators import declare

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


def test_hugging_face_example_runs(tmp_path: Path) -> None:
    declare()
    transformers = pytest.importorskip("transformers")
    (tmp_path / "sitecustomize.py").write_text("from benchmarks.zoo.operators import declare\n\ndeclare()\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{README.parent}"}
    ((_, module),) = blocks("hugging face: ")
    assert len(module.strip().splitlines()) < 15
    (tmp_path / "reviews.py").write_text(module)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "very", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "my-bert")
    tokenizer.save_pretrained(tmp_path / "my-bert")
    rows = [{"text": " ".join(["very"] * (k % 3) + [words[4 + k % 2], "film"]), "label": k % 2} for k in range(48)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ((_, commands),) = blocks("hugging face, run")
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert program == "prunekit"
        done = subprocess.run(
            [sys.executable, "-m", "prunekit", *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs/bert/pruned/small/eval.json").read_text())
    assert found["pruned"]["parameters"] < found["dense"]["parameters"]


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
