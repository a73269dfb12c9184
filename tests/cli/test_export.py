"""export on a run: what it says, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.export.test_vocabulary import TEXTS, llama  # noqa: F401
from tests.export.test_vocabulary import Case as WithTokenizer


def test_a_model_that_was_not_measured_is_exported_with_a_note(cli: Cli, run: Path, tmp_path: Path) -> None:
    evaluation = run / "pruned" / "small" / "eval.json"
    known = cli("export", run / "pruned" / "small", "--to", "state-dict", tmp_path / "known", "--json")
    assert known.code == 0
    assert "note" not in known.err
    evaluation.unlink()
    done = cli("export", run / "pruned" / "small", "--to", "state-dict", tmp_path / "unknown", "--json")
    assert done.code == 0
    assert f"{evaluation}: not there" in done.err
    assert json.loads(done.out)["difference"] == json.loads(known.out)["difference"]


@pytest.mark.slow
def test_used_tokens_are_those_of_every_split_of_the_files(cli: Cli, llama: WithTokenizer, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("datasets")
    rows = [*TEXTS, "rivers are lower", "the newer road", "a slow river", "the tower", "the road"] * 2
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    run, out = tmp_path / "run", tmp_path / "out"
    place = run / "pruned" / "small"
    data = ("--data", tmp_path / "texts.jsonl", "--text", "text", "--length", "8")
    assert cli("import", "--hf", llama[0], *data, "--out", run, "-q").code == 0
    assert cli("score", run, "-c", "magnitude", "-q").code == 0
    assert cli("prune", run, "-c", "magnitude", "-s", "0.3", "--name", "small", "-q").code == 0
    done = cli("export", place, "--to", "hf", out, "--used-tokens", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert f"gives {len(rows)} of the data's {len(rows)} texts the same tokens" in told["notes"][0]
    assert told["difference"] <= 1e-5
    assert json.loads(cli("export", place, "--to", "hf", out, "--used-tokens", "--json").out)["reused"]
    refused = cli("export", place, "--to", "onnx", tmp_path / "other", "--used-tokens")
    assert refused.code == 2
    assert "goes with hf" in refused.err
