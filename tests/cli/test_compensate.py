"""prune --compensate: the same plan, kept weights that make up for the removed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from prunekit import Plan, Trajectory
from prunekit.kernel import ModelFunction
from tests.cli.conftest import Cli


@pytest.mark.parametrize("structure", ["unstructured", "channels"])
def test_compensated_models_follow_the_same_plan(run: Path, cli: Cli, structure: str) -> None:
    asked = ("prune", run, "-c", "lamp", "-s", 0.6, "--structure", structure)
    assert cli("score", run, "-c", "lamp").code == 0
    plain = json.loads(cli(*asked, "--name", "plain", "--json").out)
    done = cli(*asked, "--name", "made-up", "--compensate", "--json")
    assert done.code == 0, done.err
    made_up = json.loads(done.out)
    assert (plain["compensated"], made_up["compensated"]) == (False, True)
    plans = [Plan.load(run / "pruned" / name / "plan.safetensors") for name in ("plain", "made-up")]
    assert all((plans[0].keep[name] == keep).all() for name, keep in plans[1].keep.items())
    before, after = (load_file(run / "pruned" / name / "model.safetensors") for name in ("plain", "made-up"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert any((before[n] != t).any() for n, t in after.items())
    if structure == "unstructured":
        assert all((t[before[n] == 0] == 0).all() for n, t in after.items() if n in plans[1].masks())
    assert json.loads(cli(*asked, "--name", "made-up", "--compensate", "--json").out)["reused"]
    anew = sum(int((before[n] != t).sum()) for n, t in after.items())
    for name, count in (("plain", 0), ("made-up", anew)):
        told = cli("eval", run / "pruned" / name)
        assert told.code == 0, told.err
        assert json.loads((run / "pruned" / name / "eval.json").read_text())["kernel"]["pruned"].get("new_values", 0) == count
        assert (f"the pruning, which set {count:,} of the kept weights anew" in told.out) == bool(count)
    changed = cli(*asked, "--name", "made-up")
    assert changed.code == 1
    assert "compensate" in changed.err
    assert cli(*asked, "--name", "later", "--compensate", "--dry-run").code == 0
    applied = cli("prune", run, "--apply", run / "pruned" / "later" / "plan.safetensors")
    assert applied.code == 0, applied.err
    again = load_file(run / "pruned" / "later" / "model.safetensors")
    assert all((again[n] == t).all() for n, t in after.items())


def test_fine_tuning_begins_from_compensated_weights(run: Path, cli: Cli) -> None:
    """As they are without fine-tuning, of channels too, whose removal is in the coordinates of the dense model there."""
    for structure in ("unstructured", "channels"):
        asked = ("prune", run, "-c", "magnitude", "-s", 0.6, "--structure", structure, "--compensate", "--no-refine")
        assert cli(*asked, "--name", f"{structure}-made-up").code == 0
        done = cli(*asked, "--finetune", 1, "--name", f"{structure}-tuned", "--json")
        assert done.code == 0, done.err
        told = json.loads(done.out)
        assert told["compensated"]
        assert told["rounds"][0]["accuracy"] != told["rounds"][0]["accuracy_pruned"]
        folder = run / "pruned" / f"{structure}-tuned"
        began = Trajectory(folder / "trajectory")
        views = began.layout.views(began.state(0))
        made_up = load_file(run / "pruned" / f"{structure}-made-up" / "model.safetensors")
        for name, mask in Plan.load(folder / "plan.safetensors").masks().items():
            assert (views[name][mask] == made_up[name][mask if structure == "unstructured" else ...].flatten()).all()
            assert not views[name][~mask].any()
        assert cli("eval", folder).code == 0
        assert json.loads(cli(*asked, "--finetune", 1, "--name", f"{structure}-tuned", "--json").out)["reused"]
    asked = ("prune", run, "-c", "magnitude", "-s", 0.6, "--compensate", "--no-refine", "--finetune", 1)
    assert cli(*asked, "--dry-run", "--name", "later").code == 0
    plan = run / "pruned" / "later" / "plan.safetensors"
    assert cli("prune", run, "--apply", plan, "--finetune", 1, "--name", "applied").code == 0
    one, other = (load_file(run / "pruned" / name / "model.safetensors") for name in ("unstructured-tuned", "applied"))
    assert all((one[name] == tensor).all() for name, tensor in other.items())
    for more in (("--finetune", 1, "--rewind", 0), ("--recalibrate",)):
        refused = cli("prune", run, "--apply", plan, *more, "--name", "no")
        assert refused.code == 2
        assert "the plan asks for compensated weights" in refused.err
    assert cli("prune", run, "--apply", plan).code == 0  # compensated, and not trained
    told = cli(*asked, "--name", "later")
    assert told.code == 1
    assert "finetune" in told.err
    refused = cli("prune", run, "-c", "magnitude", "-s", 0.6, "--compensate", "--schedule", "iterative", "--finetune", 1)
    assert refused.code == 2
    assert "compensate is for pruning at once" in refused.err


def test_the_recipe_can_ask_for_it(run: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["score"]["criteria"] = ["magnitude"]
    recipe["compare"]["sparsities"] = [0.5]
    recipe["prune"] = [{"name": "p", "criterion": "magnitude", "sparsity": 0.5, "compensate": True}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("run", tmp_path / "r.yaml", "--out", tmp_path / "other", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["prune"][0]["compensated"]
    assert "compensate" in json.loads((tmp_path / "other/pruned/p/prunekit.json").read_text())["provenance"]["request"]


def test_layers_alone_are_said(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without forward derivatives gets half of it; reused, it still says so."""

    def impossible(*args: object, **options: object) -> None:
        raise NotImplementedError("no forward derivative of aten::odd")

    monkeypatch.setattr(ModelFunction, "directional", impossible)
    asked = ("prune", run, "-c", "magnitude", "-s", 0.6, "--name", "half", "--compensate")
    for _ in range(2):
        done = cli(*asked)
        assert done.code == 0, done.err
        assert "compensated layer by layer only, since this model cannot be differentiated forward (no forward der" in done.out
