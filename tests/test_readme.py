"""README's own example, run as it is written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.zoo.operators import declare
from prunekit.cli import main
from prunekit.recipe import pruning

README = Path(__file__).parents[1] / "README.md"


def blocks(marker: str) -> list[tuple[str, str]]:
    """``(marker's argument, code)`` of every block that follows ``<!-- marker… -->``."""
    return re.findall(rf"<!-- {marker}([^>]*?) -->\n```\w+\n(.*?)```", README.read_text(), re.S)


# Commands and examples, one after another in one process, since most of the time is that of imports. The commands do not find
# modules in the working folder by themselves, as the installed program does not.
ONE_PROCESS = """
import json, sys
sys.path.remove("")
from prunekit.cli import main
from prunekit.recipe import pruning
pruning.TRY_FOR = "1s"
commands, examples = json.load(sys.stdin)
for arguments in commands:
    sys.argv = ["prunekit", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code not in (0, None):
            sys.exit(f"{arguments} ended with {stop.code}")
sys.path.insert(0, "")
for code in examples:
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
print("that was all")
"""


def parsed(commands: str) -> list[list[str]]:
    """The arguments of each line, which calls prunekit."""
    lines = [shlex.split(line.removeprefix("$ ")) for line in commands.strip().splitlines()]
    assert {program for program, *_ in lines} == {"prunekit"}
    return [arguments for _, *arguments in lines]


@pytest.mark.slow
def test_own_model_example_runs(tmp_path: Path) -> None:
    for name, code in blocks("file: "):
        (tmp_path / name).write_text(code)
    assert {p.name for p in tmp_path.iterdir()} == {"my_module.py", "mine.yaml"}
    ((_, commands),) = blocks("run")
    examples = [code for _, code in blocks("python")]
    assert len(examples) == 4
    asked = json.dumps([parsed(commands), examples])
    done = subprocess.run([sys.executable, "-c", ONE_PROCESS], cwd=tmp_path, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("that was all\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_hugging_face_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    declare()
    transformers = pytest.importorskip("transformers")
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
    monkeypatch.setattr(pruning, "TRY_FOR", "1s")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for arguments in parsed(commands):
        monkeypatch.setattr(sys, "argv", ["prunekit", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None), capsys.readouterr().err
    del sys.modules["reviews"]
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
