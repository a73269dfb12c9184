"""--device-map: where weights lie changes no figure and no score, and the models are themselves again afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit import Scores, UsageError
from prunekit.data import Samples
from prunekit.explain import EvaluationRecord
from prunekit.huggingface import load_model
from prunekit.task import get_task
from prunekit.task.evaluation import References, evaluate
from prunekit.trajectory import Trajectory
from prunekit.verbs.placement import device_map_of, placed_on
from tests.cli.conftest import Cli
from tests.huggingface.conftest import Save
from tests.huggingface.test_import import done

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
MAPS: list[Mapping[str, str | int]] = [{"": "disk"}, {"": "cpu", "BLOCKS.1": "disk"}, {"": "disk", "BLOCKS.0": "cpu"}]


def samples() -> Samples:
    ids = torch.randint(3, 60, (6, 8), generator=torch.Generator().manual_seed(0))
    return Samples.of([({"input_ids": ids}, ids)], get_task("causal_lm").batch)


@pytest.mark.parametrize("family", BLOCKS)
def test_figures_are_those_of_a_model_in_one_place(family: str, save: Save) -> None:
    dense, other = load_model(save(family)), load_model(save(family, "other", seed=1))
    task, data = get_task("causal_lm"), samples()
    expected = evaluate(other, data, task, References(dense, data, task)).figures()
    before = {name: id(parameter) for name, parameter in dense.named_parameters(remove_duplicate=False)}
    for places in ("auto", *({name.replace("BLOCKS", BLOCKS[family]): on for name, on in each.items()} for each in MAPS)):
        with placed_on([dense, other], torch.device("cpu"), places):
            on_disk = any(parameter.is_meta for parameter in dense.parameters())
            assert on_disk == (places != "auto")
            assert evaluate(other, data, task, References(dense, data, task)).figures() == expected
        assert {name: id(parameter) for name, parameter in dense.named_parameters(remove_duplicate=False)} == before
        assert not any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in dense.modules())


def test_auto_uses_the_disk_where_memory_is_short(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, task = load_model(save("llama")), samples(), get_task("causal_lm")
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 60_000})
    expected = evaluate(model, data, task).figures()
    with placed_on([model], torch.device("cpu"), "auto"):
        assert {parameter.is_meta for parameter in model.parameters()} == {True, False}
        assert evaluate(model, data, task).figures() == expected


def test_eval_says_the_same_figures_and_that_weights_were_spread(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(cli, "import", "--hf", save("llama"), "--data", f"{words}:texts", "--out", run)
    done(cli, "score", run, "--criterion", "magnitude")
    done(cli, "prune", run, "--criterion", "magnitude", "--sparsity", "0.5", "--name", "half")
    half = run / "pruned" / "half"
    done(cli, "eval", half, "--device-map", '{"": "disk"}')
    spread = EvaluationRecord.load(half / "eval.json")
    done(cli, "eval", half, "--overwrite")
    alone = EvaluationRecord.load(half / "eval.json")
    assert spread.latency["machine"] == f"{alone.latency['machine']}, weights placed by accelerate"
    assert (spread.dense, spread.pruned, spread.lost) == (alone.dense, alone.pruned, alone.lost)
    for options, message in (
        (("--device-map", "gpu"), "it must be auto, or a JSON object"),
        (("--device-map", "[1]"), "it must be auto, or a JSON object"),
        (("--device-map", '{"": 1.5}'), "'' is on 1.5"),
        (("--device-map", '{"": "tape"}'), "'' is on 'tape', which cannot be used here"),
        (("--device-map", '{"modle": "cpu"}'), "'modle' is no module of the model; did you mean model"),
        (("--device-map", '{"lm_head": "disk"}'), "says nothing of model"),
        (("--device-map", "auto", "--device", "cpu"), "leave one of them out"),
    ):
        found = cli("eval", half, "--overwrite", *options)
        assert (found.code, message in found.err) == (2, True), (options, found.err)
    assert EvaluationRecord.load(half / "eval.json") == alone


def test_a_run_with_a_path_is_refused_before_anything_is_measured(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    run, folders = tmp_path / "run", (save("llama"), save("llama", "later", seed=1))
    done(cli, "import", "--hf", folders[0], "--hf", folders[1], "--data", f"{words}:texts", "--out", run)
    done(cli, "score", run, "--criterion", "magnitude")
    done(cli, "prune", run, "-c", "magnitude", "-s", "0.5", "--name", "x")
    found = cli("eval", run / "pruned" / "x", "--device-map", "auto")
    assert found.code == 2
    assert "this run has a training path" in found.err
    assert not (run / "pruned" / "x" / "eval.json").exists()
    refused = cli("score", run, "-c", "gradient", "--device-map", "auto")
    assert refused.code == 2
    assert "this run has a training path" in refused.err


def test_scores_are_those_of_a_model_in_one_place(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    """Of a model in half precision with tied weights, whose samples are cut and whose hidden states lie in files."""
    run = tmp_path / "run"
    done(cli, "import", "--hf", save("llama", dtype=torch.bfloat16), "--data", f"{words}:texts", "--out", run)
    names = ("magnitude", "gradient", "wanda", "flap", "taylor")
    criteria = [word for name in names for word in ("-c", name)]
    done(cli, "score", run, *criteria, "--skip-unfit")
    alone = {name: Scores.load(run / "scores" / f"{name}.safetensors") for name in names}
    for places in ('{"": "disk"}', "auto"):
        done(cli, "score", run, *criteria, "--skip-unfit", "--device-map", places, "--memory", "16KiB", "--overwrite")
        for name, expected in alone.items():
            found = Scores.load(run / "scores" / f"{name}.safetensors")
            assert found.provenance == expected.provenance
            for key, importance in expected.importance.items():
                assert float((found.importance[key] - importance).norm()) <= 1e-6 * float(importance.norm()), f"{name} {key}"
    assert json.loads(done(cli, "score", run, "-c", "gradient", "--device-map", "auto", "--json"))[0]["reused"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for options, message in (
        (("-c", "gradient", "-c", "influence", "--device-map", "auto"), "influence needs a training path"),
        (("-c", "gradient", "-c", "grasp", "--device-map", "auto"), "grasp looks at the whole model at once"),
        (("-c", "taylor(target=margin)", "--device-map", "auto"), "leave target=margin out"),
        (("-c", "gradient", "--device-map", '{"modle": "cpu"}'), "did you mean model"),
        (("-c", "gradient", "--device-map", "gpu"), "it must be auto, or a JSON object"),
        (("-c", "gradient", "--device-map", "auto", "--device", "cpu"), "leave one of them out"),
    ):
        refused = cli("score", run, "--overwrite", *options)
        assert refused.code in (1, 2)
        assert message in refused.err
        assert refused.err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_scores_of_a_model_that_accelerate_placed_are_refused_by_name(save: Save) -> None:
    model: Any = load_model(save("llama"))
    with (
        placed_on([model], torch.device("cpu"), {"": "disk"}),
        pytest.raises(UsageError, match="accelerate has put it elsewhere"),
    ):
        Trajectory.of(model)


def test_maps_are_auto_or_json() -> None:
    assert device_map_of("auto") == "auto"
    assert device_map_of(json.dumps({"": "cpu", "lm_head": "disk"})) == {"": "cpu", "lm_head": "disk"}
