"""export on a run: what it says, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Cli


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
