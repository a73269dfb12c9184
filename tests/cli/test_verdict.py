"""prune, eval and run end with the verdict, whose figures are those that the artifacts hold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from prunekit.explain import EvaluationRecord
from prunekit.measure import accuracy
from prunekit.verbs.run_folder import Run
from prunekit.verbs.validation import validation_in
from tests.cli.conftest import Cli
from tests.reference import predict


def last(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_prune_and_eval_end_with_it(run: Path, cli: Cli) -> None:
    from prunekit import load

    opened = Run(run)
    total = sum(p.numel() for p in opened.model.parameters())
    done = cli("prune", run, "-c", "magnitude", "-s", 0.4, "--structure", "channels", "--name", "fits")
    small = load(run / "pruned" / "fits", opened.new_model)
    dense, pruned = (100 * accuracy(*predict(model, opened.batches("validation"))) for model in (opened.model, small))
    line = last(done.out)
    assert line.startswith(
        f"{sum(p.numel() for p in small.parameters()):,} of {total:,} parameters stay; "
        f"validation accuracy {dense:.1f} → {pruned:.1f} ({abs(dense - pruned):.1f} ± "
    )
    assert last(cli("prune", run, "-c", "magnitude", "-s", 0.4, "--structure", "channels", "--name", "fits").out) == line
    measured = last(cli("eval", run / "pruned" / "fits").out)
    assert measured.startswith(line)
    assert "; test accuracy " in measured


def test_a_plan_alone_would_leave_so_much(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "magnitude", "-s", 0.5, "--dry-run", "--name", "later")
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters would stay", last(done.out))


def test_run_ends_with_one_line_a_model(run: Path, cli: Cli) -> None:
    done = cli("run", run / "recipe.yaml", "--out", run)
    assert done.code == 0, done.err
    lines = done.out.strip().splitlines()[-2:]
    assert [line.partition(":")[0] for line in lines] == ["loose", "small"]
    assert all("parameters stay; validation accuracy" in line for line in lines)


def test_an_older_evaluation_gives_a_shorter_line(run: Path, cli: Cli) -> None:
    folder = run / "pruned" / "small"
    found = EvaluationRecord.load(folder / "eval.json")
    batches = {size: {key: times[key] for key in ("dense_ms", "pruned_ms")} for size, times in found.latency["batches"].items()}
    replace(found, lost=None, latency={"machine": "m", "batches": batches}).save(folder / "eval.json")
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters stay", last(cli("eval", folder).out))


def test_an_older_manifest_tells_the_figure_alone() -> None:
    assert validation_in({"validation_accuracy": 0.5}, "accuracy") == {"pruned": 0.5}
    assert validation_in({}, "accuracy") is None
