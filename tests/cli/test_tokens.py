"""prune with budgets of tokens: a mask from a stream, weights by the divergence, and a budget that validation data divide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunekit import Plan
from prunekit.apply import Manifest
from prunekit.recipe import Prune
from prunekit.steps.rate import MOST
from prunekit.verbs.dividing import SHARES, TRY, by_division
from tests.cli.conftest import Cli
from tests.cli.test_bad_input import one_line

pytestmark = pytest.mark.usefixtures("short")


@pytest.mark.slow
def test_a_mask_and_then_weights(cli: Cli, run: Path) -> None:
    options = ("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "both", "--refine-tokens", "1k", "--tune-tokens", 256)
    done = cli(*options, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    stream = told["refine"]["stream"]
    assert 0 < stream["tokens"] <= 1000
    assert told["refine"]["after"]["accept"] < told["refine"]["before"]["accept"]
    assert (run / "pruned" / "both" / "trajectory").is_dir()  # tuning is recorded as all fine-tuning is
    assert "learnt from" in cli(*options).out
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "few", "--refine-tokens", 9), 2, "two batches")
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "few", "--tune-tokens", 9), 2, "finetune: tokens is 9")


@pytest.mark.slow
def test_validation_data_divide_a_budget(cli: Cli, run: Path) -> None:
    options = ("prune", run, "-c", "magnitude", "-s", 0.9, "--name", "divided", "--tokens", "16k")
    done = cli(*options, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["division"]
    assert told["weights"] in SHARES
    assert len(told["tries"]) == len(SHARES)
    folder = run / "pruned" / "divided"
    spent = Manifest.load(folder / "prunekit.json").facts.get("finetune", {}).get("tokens", 0)
    spent += Plan.load(folder / "plan.safetensors").provenance.get("refine", {}).get("stream", {}).get("tokens", 0)
    assert 0 < spent <= 16000 * (1 - len(SHARES) * TRY)
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.9, "--name", "few", "--tokens", "3k"), 2, "too few to try divisions")
    again = cli(*options, "--json")
    assert json.loads(again.out)["reused"]
    one_line(cli(*options, "--dry-run"), 2, "--dry-run")


def test_a_division_says_how_long_each_part_takes() -> None:
    asked = Prune(name="x", criterion="magnitude", sparsity=0.5, tokens="100k")  # type: ignore[arg-type]
    for share in SHARES:
        found = by_division(asked, share)
        mask = found.refine.stream.tokens if found.refine and found.refine.stream else 0
        weights = (found.finetune.tokens or 0) if found.finetune else 0
        assert mask + weights == 100_000 * (1 - len(SHARES) * TRY)
        assert weights == pytest.approx(share * 80_000, abs=1)
    with pytest.raises(ValueError, match="leave refine out"):
        Prune(name="x", sparsity=0.5, tokens=1000, refine={"when": "always"})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_rate_of_tuning_follows_from_the_divergence_where_nobody_says(cli: Cli, run: Path) -> None:
    options = ("prune", run, "-c", "magnitude", "-s", 0.8, "--tune-tokens", 256, "--json")
    told = json.loads(cli(*options, "--name", "found").out)
    assert 0 < told["rounds"][0]["rate"] <= MOST
    assert told["finetune"]["rates"] == [told["rounds"][0]["rate"]]
    given = json.loads(cli(*options, "--name", "given", "--lr", 1e-4).out)
    assert "rate" not in given["rounds"][0]
    gradual = json.loads(cli(*options, "--name", "gradual", "--schedule", "gradual", "--rounds", 2).out)
    assert all("rate" not in found for found in gradual["rounds"])  # it begins with nothing removed
