"""eval times an ONNX export that lies in the pruned model's folder, in turns with torch."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from prunekit.measure import timed
from prunekit.verbs import onnx_latency
from tests.cli.conftest import Cli

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_latency_beside_torchs(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="onnx is not installed: pip install 'prunekit[onnx]'")
    place = sorted((run / "pruned").glob("[!.]*/eval.json"))[0].parent
    before = json.loads((place / "eval.json").read_text())
    assert "onnx" not in before
    monkeypatch.setattr(onnx_latency, "timed", partial(timed, most=6))
    export = ("export", place, "--to", "onnx", place / "onnx")
    assert cli(*export).code == 0
    found = cli("eval", place)
    assert found.code == 0, found.err
    assert "ms in onnxruntime" in found.out
    after = json.loads((place / "eval.json").read_text())
    told = after.pop("onnx")
    assert {**after, "checksum": ""} == {**before, "checksum": ""}
    assert told["folder"] == "onnx"
    for times in told["batches"].values():
        assert times["low"] <= times["speedup"] <= times["high"]
        assert times["onnx_ms"] > 0
    assert cli(*export).code == 0  # what eval adds makes no other export
    stamp = (place / "eval.json").read_bytes()
    assert cli("eval", place).code == 0
    assert (place / "eval.json").read_bytes() == stamp  # measured once
    assert cli("report", run).code == 0
    assert "in onnxruntime" in (run / "report.html").read_text()
    (place / "onnx" / "model.onnx").write_bytes(b"x")
    (place / "eval.json").write_text(json.dumps(before))
    found = cli("eval", place)
    assert (found.code, "model.onnx: is not what the export wrote" in found.err) == (1, True)
