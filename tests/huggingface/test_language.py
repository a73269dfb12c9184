"""eval and latency of a language model: what eval.json says beside the figures, and how a recipe turns it off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prunekit import Run
from prunekit.explain import EvaluationRecord
from prunekit.recipe.sections import Eval
from tests.cli.conftest import Cli
from tests.huggingface.conftest import Save
from tests.huggingface.test_import import done


@pytest.mark.slow
def test_eval_says_protocol_differences_and_speed(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(cli, "import", "--hf", save("llama"), "--data", f"{words}:texts", "--out", run)
    done(cli, "score", run, "--criterion", "magnitude")
    done(cli, "prune", run, "--criterion", "magnitude", "--structure", "layers", "--sparsity", "0.5", "--name", "small")
    small = run / "pruned" / "small"
    printed = done(cli, "eval", small)
    assert "24 windows of test data, 8 tokens each at most" in printed
    assert "generation: prompts of 24 tokens, 8 more, as the model has few positions (asked 128 and 32)" in printed
    record = EvaluationRecord.load(small / "eval.json")
    told = record.language
    assert told is not None
    assert (told["protocol"]["tokens"], told["protocol"]["ignored"]) == (24 * 7, 24)
    apart = told["paired"]["differences"]["perplexity"]["difference"]
    assert apart == pytest.approx(record.pruned["perplexity"] - record.dense["perplexity"])
    assert record.lost is not None
    assert record.lost["test"]["lost"] == pytest.approx(apart)
    pace = told["generation"]
    assert set(pace["batches"]) == {"1", "16"}
    assert "why" not in pace, pace["why"]
    assert all({"prefill", "decode"} <= set(each) for each in pace["batches"].values())
    assert pace["memory"]["pruned"]["cache"]["1"] < pace["memory"]["dense"]["cache"]["1"]

    replace(record, language=None).save(small / "eval.json")
    assert "language" not in json.loads((small / "eval.json").read_text())
    assert json.loads(done(cli, "eval", small, "--json"))["reused"] is False  # what an older file does not say is measured
    assert json.loads(done(cli, "eval", small, "--json"))["reused"] is True

    found = json.loads(done(cli, "latency", small, "--batch", "2", "--json"))["generation"]
    assert set(found["batches"]) == {"2"}
    recipe = Run(run).recipe
    off = recipe.model_copy(update={"eval": Eval.model_validate({**recipe.eval.model_dump(), "generation": False})})
    off.save(run / "recipe.yaml")
    assert "generation" not in json.loads(done(cli, "latency", small, "--json"))


def test_a_recipe_says_nothing_of_generation_unless_it_is_asked_otherwise() -> None:
    assert "generation" not in Eval().model_dump()
    assert Eval.model_validate(Eval().model_dump()) == Eval()
    off = Eval.model_validate({"generation": False})
    assert off.generation is None
    assert Eval.model_validate(off.model_dump()) == off
    other = Eval.model_validate({"generation": {"prompt": 16}})
    assert other.model_dump(mode="json")["generation"] == {"prompt": 16, "tokens": 32, "batches": [1, 16]}
