"""prune with budgets of tokens: a mask from a stream, weights by the divergence, and a budget that validation data divide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunekit import Plan, Trajectory
from prunekit.apply import Manifest
from prunekit.errors import NonFiniteError
from prunekit.recipe import Finetune, Layerwise, Prune
from prunekit.training.line_search import FACTOR, FIRST, LONGER
from prunekit.verbs import dividing, pruning
from prunekit.verbs.dividing import (
    IN_TURN,
    LAYERS,
    LAYERS_TOGETHER,
    MASK,
    REFITTED,
    SHARES,
    TOGETHER,
    TRY,
    WEIGHTS,
    by_division,
    menu,
    tokens_left,
)
from prunekit.verbs.run_folder import Run
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
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "few", "--refine-tokens", 9), 2, "refine: tokens is 9")
    one_line(cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "few", "--tune-tokens", 9), 2, "finetune: tokens is 9")


@pytest.mark.slow
def test_validation_data_divide_a_budget(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "looks_again", lambda run, tokens: False)
    options = ("prune", run, "-c", "magnitude", "-s", 0.9, "--name", "divided", "--tokens", "16k")
    done = cli(*options, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["division"]
    assert list(told["tries"]) == [MASK, TOGETHER, WEIGHTS, LAYERS_TOGETHER]
    assert told["tries"][told["way"]]["accuracy"] == max(found["accuracy"] for found in told["tries"].values())
    folder = run / "pruned" / "divided"
    spent = Manifest.load(folder / "prunekit.json").facts.get("finetune", {}).get("tokens", 0)
    spent += Plan.load(folder / "plan.safetensors").provenance.get("refine", {}).get("stream", {}).get("tokens", 0)
    assert 0 < spent <= 16000 * (1 - 4 * TRY)
    one_line(
        cli("prune", run, "-c", "magnitude", "-s", 0.9, "--name", "few", "--tokens", "3k"),
        2,
        "too few to try what to spend them on",
    )
    again = cli(*options, "--json")
    assert json.loads(again.out)["reused"]
    one_line(cli(*options, "--dry-run"), 2, "--dry-run")
    one_line(cli(*options[:-2], "--tokens", "16k", "--tune-tokens", "2k"), 2, "leave --tune-tokens out")
    assert cli("score", run, "-c", "kfac").code == 0
    (run / "scores" / "kfac.safetensors").write_bytes((run / "scores" / "kfac.safetensors").read_bytes()[:-9])
    one_line(cli(*options[:-3], "damaged", "--tokens", "16k"), 1, "kfac.safetensors")
    assert not (run / "pruned" / "damaged").exists()
    (run / "scores" / "kfac.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "better"), [("admm", True), pytest.param("magnitude", False, marks=pytest.mark.exhaustive)])
def test_few_samples_looked_at_again_are_left_to_layers_where_these_do_better(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, method: str, better: bool
) -> None:
    """16k tokens are many passes over the digits, and a mask is learnt here in 20 steps at most."""
    for module in (dividing, pruning):
        monkeypatch.setattr(module, "LAYERWISE", Layerwise(method=method))
    options = ("prune", run, "-c", "magnitude", "-s", 0.9, "--name", "few", "--tokens", "16k")
    done = cli(*options)
    assert done.code == 0, done.err
    assert "validation accuracy" in done.out
    assert f"{'its' if better else 'the learnt'} model is kept" in done.out
    folder = run / "pruned" / "few"
    facts = Manifest.load(folder / "prunekit.json").facts
    beside = facts["division"]["layerwise"]
    assert beside["better"] is better
    assert (beside["figures"]["accuracy"] > beside["learnt"]["accuracy"]) is better
    plan = Plan.load(folder / "plan.safetensors")
    assert plan.provenance["criterion"] == (method if better else "magnitude")
    kept = beside["figures"] if better else beside["learnt"]
    assert facts["validation"]["pruned"] == pytest.approx(kept["accuracy"])
    assert plan.sparsity()["prunable"] == pytest.approx(0.9, abs=0.002)
    again = cli(*options, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["reused"]
    assert cli("eval", folder).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", pytest.param("channels", marks=pytest.mark.exhaustive)])
def test_mask_and_weights_together(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, structure: str) -> None:
    monkeypatch.setattr(pruning, "looks_again", lambda run, tokens: False)
    monkeypatch.setattr(dividing, "menu", lambda wanted: (TOGETHER,))
    options = ("prune", run, "-c", "magnitude", "-s", 0.6, "--structure", structure, "--name", "both", "--tokens", "16k")
    done = cli(*options)
    assert done.code == 0, done.err
    assert "tokens spent on mask and weights together" in done.out
    folder = run / "pruned" / "both"
    plan = Plan.load(folder / "plan.safetensors")
    facts = plan.provenance["refine"]
    assert facts["after"]["accept"] < facts["before"]["accept"]
    assert facts["stream"]["tokens"] <= 16000 * (1 - TRY)
    assert facts["stream"]["weights"]["rate"] > 0
    if structure == "unstructured":
        weights = load_file(folder / "model.safetensors")
        dense = load_trajectory_end(run)
        for name, keep in plan.keep.items():
            assert not weights[name][~keep].any()
            assert not (weights[name][keep] == dense[name][keep]).all()
    assert json.loads(cli(*options, "--json").out)["reused"]
    told = cli("eval", folder)
    assert told.code == 0
    kernel = json.loads((folder / "eval.json").read_text())["kernel"]["pruned"]
    steps = facts["stream"]["steps"]  # the last one leads to what is taken, or is gone back from
    assert kernel["steps"]["finetuning"] in (steps, steps - 1)
    assert kernel["mean_error"] < 0.02
    one_line(cli("prune", run, "--apply", folder / "plan.safetensors", "--name", "again"), 2, "learnt together with weights")
    changed = cli(*options[:-1], "20k")
    one_line(changed, 1, "tokens")


@pytest.mark.slow
@pytest.mark.parametrize("way", list(REFITTED))
def test_units_that_stay_are_refitted_before_weights_are_tuned(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(dividing, "menu", lambda wanted: (REFITTED[way],))
    options = ("prune", run, "-c", "magnitude", "-s", 0.3, "--structure", "channels", "--name", "units", "--tokens", "16k")
    done = cli(*options)
    assert done.code == 0, done.err
    assert "refitted" in done.out
    folder = run / "pruned" / "units"
    plan, facts = Plan.load(folder / "plan.safetensors"), Manifest.load(folder / "prunekit.json").facts
    assert plan.provenance["request"]["compensate"]
    assert facts.get("finetune", {}).get("tokens", 0) == pytest.approx(SHARES[way] * 16000 * (1 - TRY), abs=1)
    assert ("refine" in plan.provenance) == (way != WEIGHTS)
    masks = ("prune", run, "-c", "magnitude", "-s", 0.3, "--structure", "channels", "--name", "masked", "--no-refine")
    assert cli(*masks).code == 0
    assert divergence(cli, folder) < divergence(cli, run / "pruned" / "masked")
    assert json.loads(cli(*options, "--json").out)["reused"]


def divergence(cli: Cli, folder: Path) -> float:
    """From the dense model, on test data."""
    assert cli("eval", folder).code == 0
    found: float = json.loads((folder / "eval.json").read_text())["pruned"]["kl"]
    return found


@pytest.mark.slow
def test_layers_that_cannot_be_solved_are_left_out_and_named(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise NonFiniteError("what reaches fc1 is NaN")

    monkeypatch.setattr(dividing, "by_layers", fails)
    monkeypatch.setattr(dividing, "menu", lambda wanted: (WEIGHTS, LAYERS_TOGETHER))
    done = cli("prune", run, "-c", "magnitude", "-s", 0.6, "--name", "rest", "--tokens", "16k")
    assert done.code == 0, done.err
    assert "layers, then together not tried, what reaches fc1 is NaN" in done.out
    assert "not compared, what reaches fc1 is NaN" in done.out


def from_layers(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> tuple[tuple[object, ...], str]:
    """All tokens spent on one way from ADMM by kfac's shares, which is found once: the command, and what it printed."""
    calls, solve = [], dividing.by_layers

    def counted(*given: Any) -> Any:
        calls.append(given)
        return solve(*given)

    monkeypatch.setattr(dividing, "by_layers", counted)
    monkeypatch.setattr(pruning, "looks_again", lambda run, tokens: False)
    monkeypatch.setattr(dividing, "menu", lambda wanted: (way,))
    assert cli("score", run, "-c", "kfac").code == 0
    options = ("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "layers", "--tokens", "16k")
    done = cli(*options)
    assert done.code == 0, done.err
    assert len(calls) == 1  # for its try and for the rest of the tokens
    return options, done.out


@pytest.mark.slow
def test_weights_tuned_after_layers(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADMM's mask, by kfac's shares where that is scored; its weights move as is said, what it removed stays 0."""
    options, out = from_layers(cli, run, monkeypatch, LAYERS)
    assert "after ADMM's mask and weights layer by layer" in out
    folder = run / "pruned" / "layers"
    plan, facts = Plan.load(folder / "plan.safetensors"), Manifest.load(folder / "prunekit.json").facts
    assert facts["finetune"]["tokens"] == 16000 * (1 - TRY)
    assert facts["finetune"]["rates"][0] > 0
    assert facts["division"]["way"] == LAYERS
    by_layers = ("prune", run, "--layerwise", "admm", "-c", "kfac", "-s", 0.8, "--name", "admm")
    assert cli(*by_layers).code == 0
    before, after = (load_file(run / "pruned" / name / "model.safetensors") for name in ("admm", "layers"))
    for name, keep in plan.keep.items():
        assert torch.equal(keep, Plan.load(run / "pruned" / "admm" / "plan.safetensors").keep[name])
        assert not after[name][~keep].any()
        assert not torch.equal(before[name], after[name])
    assert json.loads(cli(*options, "--json").out)["reused"]
    assert cli("eval", folder).code == 0
    assert "what the mask alone does to the dense weights" in cli("explain", run / "pruned" / "admm").out
    one_line(cli("prune", run, "--apply", folder / "plan.safetensors", "--name", "again"), 2, "made with --layerwise admm")


@pytest.mark.slow
def test_mask_and_weights_together_from_layers(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with ADMM's model, by kfac's shares where that is scored, and ends nearer to the dense one."""
    options, out = from_layers(cli, run, monkeypatch, LAYERS_TOGETHER)
    assert "mask and weights together, from ADMM's layer by layer" in out
    assert "how much of each goes by kfac; mask and weights were learnt on from there" in out
    assert cli("prune", run, "--layerwise", "admm", "-c", "kfac", "-s", 0.8, "--name", "admm").code == 0
    folder, by_layers = run / "pruned" / "layers", run / "pruned" / "admm"
    plan, first = (Plan.load(path / "plan.safetensors") for path in (folder, by_layers))
    facts = plan.provenance["refine"]
    assert facts["after"]["accept"] < facts["before"]["accept"]
    assert facts["stream"]["weights"]["start"] == "given"
    weights, before = (load_file(path / "model.safetensors") for path in (folder, by_layers))
    assert sum(int(keep.sum()) for keep in plan.keep.values()) == sum(int(keep.sum()) for keep in first.keep.values())
    for name, keep in plan.keep.items():
        assert not weights[name][~keep].any()
        assert not torch.equal(before[name], weights[name])
    assert json.loads(cli(*options, "--json").out)["reused"]
    assert "its weights were learnt with the mask" in cli("explain", folder).out
    one_line(cli("prune", run, "--apply", folder / "plan.safetensors", "--name", "again"), 2, "learnt together with weights")


def load_trajectory_end(run: Path) -> dict[str, Tensor]:
    trajectory = Trajectory(run / "trajectory")
    return trajectory.layout.views(trajectory.state(-1))


def test_weights_are_trained_in_turn_where_it_is_said_how() -> None:
    asked = Prune(name="x", criterion="magnitude", sparsity=0.5, tokens="100k")  # type: ignore[arg-type]
    assert menu(asked) == (MASK, TOGETHER, WEIGHTS, LAYERS_TOGETHER)
    assert menu(asked.model_copy(update={"finetune": Finetune(lr=1e-3)})) == (MASK, TOGETHER, WEIGHTS, LAYERS_TOGETHER)
    assert menu(asked.model_copy(update={"finetune": Finetune(lora=4)})) == (MASK, IN_TURN, WEIGHTS, LAYERS)
    for structure, together in (("channels", (TOGETHER,)), ("heads+neurons", (TOGETHER,)), ("experts", ())):
        units = asked.model_copy(update={"structure": structure})
        assert menu(units) == (REFITTED[IN_TURN], *together, REFITTED[WEIGHTS])
    for said in ({"structure": "channels"}, {"structure": "block:2x2"}, {"ratios": {"w": 0.5}}, {"floor": 0.1}):
        assert LAYERS_TOGETHER not in menu(asked.model_copy(update=said))  # whose shares a layer-wise method does not know


def test_a_division_says_how_long_each_part_takes(run: Path) -> None:
    asked = Prune(name="x", criterion="magnitude", sparsity=0.5, tokens="100k")  # type: ignore[arg-type]
    for way, share in SHARES.items():
        tried = {"tries": dict.fromkeys((MASK, TOGETHER, WEIGHTS)), "left_out": {LAYERS: "why"}}
        found = by_division(Run(run), asked, {"way": way, **tried})
        mask = found.refine.stream.tokens if found.refine and found.refine.stream else 0
        weights = (found.finetune.tokens or 0) if found.finetune else 0
        assert mask + weights == 100_000 * (1 - 4 * TRY)
        assert weights == pytest.approx(share * 80_000, abs=1)


def test_what_an_earlier_prunekit_tried_counts_as_it_was_tried() -> None:
    """Its tries were other ones, and as many tokens went into them."""
    asked = Prune(name="x", criterion="magnitude", sparsity=0.5, tokens="100k", structure="experts")  # type: ignore[arg-type]
    assert tokens_left(asked, {"tries": dict.fromkeys((MASK, IN_TURN, WEIGHTS)), "left_out": {TOGETHER: "why"}}) == 85_000
    assert tokens_left(asked, {"tries": dict.fromkeys(menu(asked))}) == 90_000


@pytest.mark.slow
def test_the_rate_of_tuning_follows_from_the_divergence_where_nobody_says(cli: Cli, run: Path) -> None:
    options = ("prune", run, "-c", "magnitude", "-s", 0.8, "--tune-tokens", 256, "--json")
    told = json.loads(cli(*options, "--name", "found").out)
    assert 0 < told["rounds"][0]["rate"] <= FIRST * FACTOR**LONGER
    assert told["finetune"]["rates"] == [told["rounds"][0]["rate"]]
    given = json.loads(cli(*options, "--name", "given", "--lr", 1e-4).out)
    assert "rate" not in given["rounds"][0]
    gradual = json.loads(cli(*options, "--name", "gradual", "--schedule", "gradual", "--rounds", 2).out)
    assert all("rate" not in found for found in gradual["rounds"])  # it begins with nothing removed
