"""Folders of transformers: what is loaded from them computes what was pruned, by transformers alone where a config can say it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import prunekit
from prunekit import ArtifactError, UsageError
from tests.export.conftest import bert, gpt2, llama, pruned, t5, tokens, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, and of plans that a few units cannot meet
ATTENTION = {gpt2: ("*attn*",), llama: ("*attn*",), bert: ("*attention*", "*pooler*")}
SAID = {
    "llama-masks": (llama, "unstructured", (), "global"),
    "llama-heads": (llama, "heads", (), "uniform"),
    "llama-layers": (llama, "layers", (), "global"),
    "gpt2-neurons": (gpt2, "channels", ATTENTION[gpt2], "uniform"),
    "bert-masks": (bert, "unstructured", (), "global"),
    "bert-neurons": (bert, "channels", ATTENTION[bert], "uniform"),
}
"""Name -> model, structure, what is not pruned, allocation: what a config can say."""
NOT_SAID = {"bert-heads": (bert, "heads", (), "uniform"), "llama-neurons": (llama, "channels", ATTENTION[llama], "global")}
ALONE = """
import sys, torch
from benchmarks.zoo.operators import declare
declare()
import transformers
inputs = torch.load("inputs.pt", weights_only=True)
found = {}
for asked in sys.argv[1:]:
    folder, kind = asked.split("=")
    model = getattr(transformers, kind).from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(**inputs).logits
    found[folder + "-parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
    if model.can_generate():
        generated = model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)
        assert generated.shape[1] > inputs["input_ids"].shape[1], generated.shape
assert not [name for name in sys.modules if name.startswith("prunekit")]
torch.save(found, "found.pt")
"""


def logits(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SAID)
def test_transformers_alone_loads_what_a_config_says(name: str, tmp_path: Path) -> None:
    make, structure, ignore, allocation = SAID[name]
    dense = make()
    small, plan = pruned(dense, tokens(), structure, ignore, 0.25, allocation, 32 if make is gpt2 else 1)
    expected = logits(small, tokens())
    record = prunekit.export(small, "hf", tmp_path / "out", tokens(), plan=plan)
    assert record.loads_with == f"transformers.{type(dense).__name__}.from_pretrained"
    assert record.difference is not None
    assert record.difference <= 1e-5
    assert not (tmp_path / "out" / "prunekit.json").exists()
    back = type(dense).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(back, tokens()), expected, rtol=1e-5, atol=1e-5)
    assert count(back) == count(small)
    assert (count(back) < count(dense)) == (structure != "unstructured")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(dense).__name__]
    assert torch.equal(logits(small, tokens()), expected)  # the model itself is as it was


@pytest.mark.exhaustive
def test_a_fresh_process_without_prunekit_loads_and_generates(tmp_path: Path) -> None:
    """Importing transformers takes seconds, so one process loads all."""
    names = ("llama-heads", "llama-layers", "gpt2-neurons", "bert-neurons")
    torch.save(tokens(), tmp_path / "inputs.pt")
    asked, expected = [], {}
    for name in names:
        make, structure, ignore, allocation = SAID[name]
        small, plan = pruned(make(), tokens(), structure, ignore, 0.25, allocation, 32 if make is gpt2 else 1)
        prunekit.export(small, "hf", tmp_path / name, tokens(), plan=plan)
        asked.append(f"{name}={type(small).__name__}")
        expected[name] = logits(small, tokens()), count(small)
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, (answer, parameters) in expected.items():
        torch.testing.assert_close(found[name], answer, rtol=1e-5, atol=1e-5)
        assert int(found[f"{name}-parameters"]) == parameters


@pytest.mark.parametrize("name", NOT_SAID)
def test_what_no_config_says_is_loaded_by_prunekit_and_never_silently_by_transformers(name: str, tmp_path: Path) -> None:
    make, structure, ignore, allocation = NOT_SAID[name]
    small, plan = pruned(make(), tokens(), structure, ignore, 0.3, allocation)
    record = prunekit.export(small, "hf", tmp_path / "out", tokens(), plan=plan)
    assert record.loads_with == "prunekit.load_hf"
    assert any("load_hf" in note for note in record.notes)
    back = prunekit.load_hf(tmp_path / "out")
    assert torch.equal(logits(back, tokens()), logits(small, tokens()))
    assert count(back) == count(small)
    with pytest.raises(OSError, match="safetensors"):
        type(small).from_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match="give it plan="):
        prunekit.export(small, "hf", tmp_path / "other", tokens())
    assert not (tmp_path / "other").exists()


def test_t5_by_its_two_stacks(tmp_path: Path) -> None:
    inputs = {**tokens(), "decoder_input_ids": tokens()["input_ids"][:, :4]}
    small, plan = pruned(t5(), inputs, "heads", (), 0.25, "uniform")
    record = prunekit.export(small, "hf", tmp_path / "out", inputs, plan=plan)
    back = prunekit.load_hf(tmp_path / "out")
    torch.testing.assert_close(logits(back, inputs), logits(small, inputs), rtol=1e-5, atol=1e-5)
    assert back.generate(inputs["input_ids"], max_new_tokens=3).shape[0] == 3
    assert record.difference is not None


def test_files_dtype_and_shards_come_as_they_were(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size=20_000)
    assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "modeling_mine.py", "notes.txt"):
        (tmp_path / "source" / name).write_text("{}")
    model = transformers().LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    small, plan = pruned(model, tokens(), "unstructured")
    record = prunekit.export(small, "hf", tmp_path / "out", tokens(), plan=plan)
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md"} <= set(record.files)
    assert not {"modeling_mine.py", "notes.txt"} & set(record.files)
    assert not record.notes
    assert "model.safetensors.index.json" in record.files
    largest = max(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert shard.stat().st_size <= 1.1 * largest
        with safe_open(shard, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_card_says_what_is_known_and_no_more(tmp_path: Path) -> None:
    small, plan = pruned(bert(), tokens(), "unstructured", sparsity=0.5)
    prunekit.export(small, "hf", tmp_path / "out", tokens(), plan=plan)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "structure: unstructured" in card
    assert "criterion: `magnitude`" in card
    assert f"removed: {100 * plan.sparsity()['prunable']:.2f} % of the prunable parameters" in card
    assert "was not measured" in card
    assert str(tmp_path) not in card


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a Linear and none of transformers'; export it to state-dict"):
        prunekit.export(nn.Linear(2, 2), "hf", tmp_path / "out", torch.zeros(1, 2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json; name the folder"),
        ('{"model_type": "llama", "architectures": ["Mine"]}', "architectures is 'Mine', no model class of transformers"),
        ('{"model_type": "nothing like it"}', "model_type 'nothing like it' is unknown"),
        ('{"model_type": "llama"', "config.json: not a readable JSON file"),
        ('{"model_type": "llama", "attn_implementation": "some/kernel"}', "code that would be fetched"),
    ],
)
def test_folders_that_load_hf_cannot_read(config: str | None, said: str, tmp_path: Path) -> None:
    transformers()
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises((UsageError, ArtifactError), match=said) as refused:
        prunekit.load_hf(tmp_path)
    assert "\n" not in str(refused.value)


def test_load_hf_runs_and_unpickles_nothing_of_a_folder(tmp_path: Path) -> None:
    """A folder with pickled weights alone, and one of ours whose config was given code to fetch since."""
    (tmp_path / "pickled").mkdir()
    bert().config.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ArtifactError, match=r"has pytorch_model.bin and no safetensors file"):
        prunekit.load_hf(tmp_path / "pickled")
    small, plan = pruned(bert(), tokens(), "heads", sparsity=0.3)
    assert prunekit.export(small, "hf", tmp_path / "ours", tokens(), plan=plan).loads_with == "prunekit.load_hf"
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_attn_implementation": "some/kernel"}))
    with pytest.raises(ArtifactError, match="code that would be fetched"):
        prunekit.load_hf(tmp_path / "ours")
