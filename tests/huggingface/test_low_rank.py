"""prune --lora on a language model: from an import to an export, and what is refused before anything long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunekit import Trajectory
from tests.cli.conftest import Cli
from tests.cli.test_bad_input import one_line
from tests.huggingface.conftest import Save
from tests.huggingface.test_import import done


@pytest.mark.exhaustive
def test_only_low_rank_matrices_are_trained_and_an_ordinary_model_is_written(
    save: Save, words: str, cli: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    states = [part for seed in (0, 1) for part in ("--hf", save("gpt2", f"state-{seed}", seed=seed))]
    done(cli, "import", *states, "--data", f"{words}:texts", "--out", run)
    done(cli, "score", run, "-c", "magnitude")
    asked = ("prune", run, "-c", "magnitude", "-s", 0.5, "--tune-tokens", 384, "--lr", 0.01, "--lora")
    for rank, message in ((33, "no weight has so many inputs and outputs"), (0, "--lora")):
        one_line(cli(*asked, rank, "--name", "no"), 2, message)
    assert not (run / "pruned").exists()

    assert "lora of rank 4" in done(cli, *asked, 4, "--name", "tuned")
    folder = run / "pruned" / "tuned"
    told = json.loads((folder / "prunekit.json").read_text())["facts"]
    sizes = [(32, 96), (32, 32), (32, 128), (128, 32)] * 2  # attention in and out, MLP in and out, of two blocks
    lora = told["finetune"]["lora"]
    assert lora["trained"] == sum(4 * (inputs + outputs) for inputs, outputs in sizes)
    assert lora["of"] == sum(inputs * outputs for inputs, outputs in sizes)
    assert lora["held"] == {"transformer.wte.weight": "an embedding"}
    assert done(cli, *asked, 4, "--name", "tuned").splitlines()[0].endswith("reused)")

    state, masks = load_file(folder / "model.safetensors"), load_file(folder / "masks.safetensors")
    start = Trajectory(run / "trajectory").model_state()
    child = Trajectory(folder / "trajectory")
    assert child.header["optimizer"] is None
    assert child.provenance["parent"]["trajectory"] == Trajectory(run / "trajectory").hash
    for name, mask in masks.items():
        kept = mask.bool()
        assert not state[name][~kept].any()
        assert bool((state[name] != start[name])[kept].any()) == (name not in lora["held"])
    for name in state.keys() - masks.keys():
        assert torch.equal(state[name], start[name]), name
    done(cli, "eval", folder)
    assert json.loads((folder / "eval.json").read_text())["kernel"]["pruned"]["steps"]["finetuning"] == told["finetune"]["steps"]
    done(cli, "export", folder, tmp_path / "small", "--to", "hf")
