"""prune --layerwise: mask and weights layer by layer, reused, evaluated and refused as other pruning is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prunekit import Plan, Trajectory
from tests.cli.conftest import Cli


def test_mask_and_weights_are_written_reused_and_evaluated(run: Path, cli: Cli) -> None:
    asked = ("prune", run, "--layerwise", "sparsegpt", "-s", 0.6)
    done = cli(*asked)
    assert done.code == 0, done.err
    assert "layer by layer from 256 training samples, compared within layer; kept weights have new values" in done.out
    folder = run / "pruned" / "sparsegpt-unstructured-0.6"
    plan, weights = Plan.load(folder / "plan.safetensors"), load_file(folder / "model.safetensors")
    assert (plan.provenance["criterion"], plan.provenance["trajectory"] is not None) == ("sparsegpt", True)
    for name, keep in plan.keep.items():
        assert ((weights[name] != 0) == keep).all()
        assert int((~keep).sum()) == round(0.6 * keep.numel())
    assert "classifier.weight" not in plan.keep
    assert cli(*asked).out.splitlines()[0].endswith("(unchanged, reused)")
    assert cli("eval", folder).code == 0
    changed = cli("prune", run, "--layerwise", "wanda", "-s", 0.6, "--name", folder.name)
    assert changed.code == 1
    assert "criterion was 'sparsegpt', is now 'wanda'" in changed.err
    applied = cli("prune", run, "--apply", folder / "plan.safetensors", "--name", "again")
    assert applied.code == 2
    assert "made with --layerwise sparsegpt, which finds new weights with the mask" in applied.err


def test_a_mask_without_new_weights_can_be_applied(run: Path, cli: Cli) -> None:
    assert cli("prune", run, "--layerwise", "wanda", "--structure", "2:4", "--name", "w").code == 0
    applied = cli("prune", run, "--apply", run / "pruned" / "w" / "plan.safetensors", "--name", "w2")
    assert applied.code == 0, applied.err
    one, other = (load_file(run / "pruned" / name / "model.safetensors") for name in ("w", "w2"))
    assert all((one[name] == tensor).all() for name, tensor in other.items())


def test_a_criterion_says_how_much_of_each_layer_goes(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "--layerwise", "admm", "-c", "magnitude", "-s", 0.8, "--name", "shares")
    assert done.code == 0, done.err
    alone = cli("prune", run, "-c", "magnitude", "-s", 0.8, "--name", "alone", "--no-refine")
    assert alone.code == 0, alone.err
    plans = [Plan.load(run / "pruned" / name / "plan.safetensors") for name in ("shares", "alone")]
    one, other = ({name: int(mask.sum()) for name, mask in plan.masks().items()} for plan in plans)
    assert one == other
    assert len({round(float(mask.double().mean()), 2) for mask in plans[0].masks().values()}) > 1
    again = cli("prune", run, "--layerwise", "admm", "-c", "magnitude", "-s", 0.8, "--name", "shares")
    assert "reused" in again.out + again.err
    assert cli("prune", run, "--layerwise", "admm", "-s", 0.8, "--name", "shares").code != 0


def test_fine_tuning_goes_on_from_its_weights(run: Path, cli: Cli) -> None:
    """The steps are the path's, which has a straight piece from the dense model to the method's; the kernel rebuilds it all."""
    asked = ("prune", run, "--layerwise", "admm", "-s", 0.6)
    assert cli(*asked, "--name", "admm").code == 0
    done = cli(*asked, "--finetune", 1, "--name", "tuned", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["finetune"]["steps"] > 0
    folder = run / "pruned" / "tuned"
    before, after = (load_file(run / "pruned" / name / "model.safetensors") for name in ("admm", "tuned"))
    steps, dense = Trajectory(folder / "trajectory"), Trajectory(run / "trajectory")
    began, ended = steps.layout.views(steps.state(0)), steps.layout.views(steps.state(-1))
    for name, keep in Plan.load(folder / "plan.safetensors").keep.items():
        assert (began[name] == before[name]).all()
        assert (ended[name] == after[name]).all()
        assert ((after[name] != 0) == keep).all()
        assert (began[name] != ended[name]).any()
    assert steps.provenance["parent"]["trajectory"] == dense.hash
    told = cli("eval", folder)
    assert told.code == 0, told.err
    kernel = json.loads((folder / "eval.json").read_text())["kernel"]["pruned"]
    assert kernel["steps"]["finetuning"] == len(steps)
    assert kernel["mean_error"] < 0.05 * kernel["mean_output"] + 0.005
    assert json.loads(cli(*asked, "--finetune", 1, "--name", "tuned", "--json").out)["reused"]
    other = cli(*asked, "--finetune", 2, "--name", "tuned")
    assert other.code == 1
    assert "finetune" in other.err
    applied = cli("prune", run, "--apply", folder / "plan.safetensors", "--name", "again")
    assert applied.code == 2
    assert "made with --layerwise admm" in applied.err


@pytest.mark.parametrize(
    ("criterion", "message"), [("tempered(taylor)", "stands for"), ("kfac", "score"), ("no_such", "does not exist")]
)
def test_one_criterion_that_is_scored_divides(run: Path, cli: Cli, criterion: str, message: str) -> None:
    done = cli("prune", run, "--layerwise", "admm", "-c", criterion, "-s", 0.8, "--name", "y")
    assert done.code in (1, 2)
    assert message in done.err
    assert not (run / "pruned" / "y").exists()


@pytest.mark.slow  # refining itself
@pytest.mark.usefixtures("short")
def test_refining_begins_at_its_mask_with_the_dense_weights(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "--layerwise", "admm", "-s", 0.8, "--refine", "--name", "r")
    assert done.code == 0, done.err
    assert "its mask was refined, with the dense model's weights" in done.out
    plan = Plan.load(run / "pruned" / "r" / "plan.safetensors")
    assert plan.before is not None
    assert sum(int(k.sum()) for k in plan.keep.values()) == sum(int(k.sum()) for k in plan.before.keep.values())
    assert cli("prune", run, "--apply", run / "pruned" / "r" / "plan.safetensors", "--name", "r2").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--compensate", "-s", 0.5),
            "--layerwise finds by itself what goes of a layer; leave --compensate out",
        ),
        (("--dry-run", "-s", 0.5), "--dry-run writes a plan alone"),
        (("-s", 0.5, "--rewind", 0), "leave --rewind out"),
        (("-s", 0.5, "--finetune", 1, "--schedule", "iterative"), "leave --schedule out"),
        (("-s", 0.5, "--finetune", 1, "--refine-again", 1), "--refine-again takes back what was removed"),
        ((), "prune needs --sparsity"),
    ],
)
def test_what_makes_no_sense_beside_it_is_refused(run: Path, cli: Cli, options: tuple[object, ...], message: str) -> None:
    done = cli("prune", run, "--layerwise", "sparsegpt", "--name", "x", *options)
    assert done.code == 2
    assert message in done.err
    assert not (run / "pruned" / "x").exists()
