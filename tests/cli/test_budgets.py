"""prune to a budget, from the command line: what is promised holds for what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prunekit.measure import accuracy, sizes
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import Cli
from tests.reference import predict


def pruned(run: Path, cli: Cli, *options: object) -> dict[str, object]:
    done = cli("prune", run, "-c", "magnitude", "--name", "fits", "--json", *options)
    assert done.code == 0, done.err
    found: dict[str, object] = json.loads(done.out)
    return found


@pytest.mark.parametrize("structure", ["unstructured", "channels"])
def test_parameters(run: Path, cli: Cli, structure: str) -> None:
    dense = sum(p.numel() for p in Run(run).model.parameters())
    pruned(run, cli, "--max-params", dense // 2, "--structure", structure)
    weights = load_file(run / "pruned" / "fits" / "model.safetensors")
    left = sum(int((w != 0).sum()) if structure == "unstructured" else w.numel() for w in weights.values())
    assert 0.8 * dense / 2 < left <= dense // 2


def test_macs_and_bytes(run: Path, cli: Cli) -> None:
    from prunekit import load

    opened = Run(run)
    dense = sizes(opened.model, opened.example[:1])["macs"]
    pruned(run, cli, "--max-macs", dense // 2, "--structure", "channels")
    small = load(run / "pruned" / "fits", opened.new_model)
    assert 0.7 * dense / 2 < sizes(small, opened.example[:1])["macs"] <= dense // 2
    found = pruned(run, cli, "--max-bytes", 4000, "--structure", "channels", "--overwrite")
    assert (run / "pruned" / "fits" / "model.safetensors").stat().st_size <= 4000
    assert found["budget"] == {"max_bytes": 4000}


@pytest.mark.parametrize("budget", ["--max-macs", "--max-bytes", "--max-params"])
def test_budgets_hold_for_refined_channels(run: Path, cli: Cli, budget: str) -> None:
    """Channels change places between layers only where what is measured depends on their number of weights alone."""
    from prunekit import load

    opened = Run(run)
    macs = sizes(opened.model, opened.example[:1])["macs"]
    limit = {"--max-macs": macs // 2, "--max-bytes": 4000, "--max-params": 900}[budget]
    options = ("--structure", "channels", "--refine", "--refine-budget", "1s")
    pruned(run, cli, budget, limit, *options)
    folder = run / "pruned" / "fits"
    small = load(folder, opened.new_model)
    reached = {
        "--max-macs": sizes(small, opened.example[:1])["macs"],
        "--max-bytes": (folder / "model.safetensors").stat().st_size,
        "--max-params": sum(p.numel() for p in small.parameters()),
    }
    assert 0.7 * limit < reached[budget] <= limit


def test_accuracy_on_validation_data(run: Path, cli: Cli) -> None:
    from prunekit import load

    opened = Run(run)
    dense = accuracy(*predict(opened.model, opened.batches("validation")))
    found = pruned(run, cli, "--max-accuracy-drop", 5)
    kept = accuracy(*predict(load(run / "pruned" / "fits", opened.new_model), opened.batches("validation")))
    assert kept >= dense - 0.05
    assert found["reached"] == pytest.approx(100 * (dense - kept), abs=1e-3)
    assert "reused" in cli("prune", run, "-c", "magnitude", "--name", "fits", "--max-accuracy-drop", 5).out


def test_accuracy_after_fine_tuning(run: Path, cli: Cli) -> None:
    found = pruned(run, cli, "--max-accuracy-drop", 5, "--finetune", 2, "--structure", "channels")
    facts = json.loads((run / "pruned" / "fits" / "prunekit.json").read_text())["facts"]
    opened = Run(run)
    dense = accuracy(*predict(opened.model, opened.batches("validation")))
    assert facts["validation_accuracy"] == pytest.approx(dense - found["reached"] / 100, abs=1e-6)  # type: ignore[operator]
    assert facts["budget"] == {"max_accuracy_drop": 5}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-params", 100, "--sparsity", 0.5), "one of them decides"),
        (("--max-macs", 1000), "max_macs is 1000, and the structure is unstructured: masks make nothing smaller"),
        (("--max-params", 100, "--structure", "2:4"), "fixed share"),
        (("--max-accuracy-drop", -1), "--max-accuracy-drop is -1"),
    ],
)
def test_budgets_that_make_no_sense(run: Path, cli: Cli, options: tuple[object, ...], said: str) -> None:
    done = cli("prune", run, "-c", "magnitude", "--name", "wrong", *options)
    assert done.code == 2
    assert said in done.err
