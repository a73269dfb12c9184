"""Folders that cannot be right are refused by name, in one line, before anything long begins."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.errors import PrunekitError, UsageError
from prunekit.huggingface import load_model, new_model
from prunekit.recipe import Recipe
from tests.cli.conftest import Cli
from tests.huggingface.conftest import Save

Break = Callable[[Path], None]


def said(**values: Any) -> Break:
    def change(folder: Path) -> None:
        place = folder / "config.json"
        content = {**json.loads(place.read_text()), **values}
        place.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def without(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: bytes) -> Break:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def headless(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


REFUSED: dict[str, tuple[Break, str]] = {
    "no config": (without("config.json"), r": no config\.json; name the folder that save_pretrained wrote"),
    "an adapter": (adapter, r": an adapter \(adapter_config\.json\), not a whole model; prunekit import --hf BASE --hf"),
    "no JSON": (written("config.json", b"{"), r"config\.json: not a readable JSON file"),
    "a list": (written("config.json", b"[]"), r"config\.json: holds a list, not a mapping"),
    "no type": (said(model_type=...), r"config\.json: has no model_type"),
    "unknown type": (said(model_type="brt"), r"config\.json: model_type 'brt' is unknown to transformers [\d.]+; did you mean"),
    "a type with code": (
        said(model_type="zzz", auto_map={"AutoModel": "m.M"}),
        r"code of its own \(auto_map\)",
    ),
    "unknown class": (said(architectures=["BertForAll"]), r"architectures is 'BertForAll', no model class of transformers"),
    "a class with code": (said(architectures=["Mine"], auto_map={"AutoModel": "m.M"}), r"'Mine', no model class .*\(auto_map\)"),
    "no class": (said(architectures=["BertConfig"]), r"'BertConfig', no model class of transformers"),
    "another's class": (said(architectures=["GPT2LMHeadModel"]), r"GPT2LMHeadModel, which does not go with model_type bert"),
    "several classes": (said(architectures=["BertModel", "BertForMaskedLM"]), r"names not one class; say auto"),
    "fetched kernels": (
        said(attn_implementation="some/kernel"),
        r"attn_implementation is 'some/kernel', code that would be",
    ),
    "quantised": (said(quantization_config={"bits": 4}), r"the weights are quantised \(quantization_config\)"),
    "a dtype": (said(dtype="int4"), r"dtype is 'int4'; it must be float32"),
    "a bad value": (said(num_attention_heads=5), r"loading BertForSequenceClassification failed: ValueError: The hidden size"),
    "no weights": (without("model.safetensors"), r": has no weights; it must hold model\.safetensors"),
    "pickled weights": (pickled, r": has pytorch_model\.bin and no safetensors file; save it again .*, or give --weights"),
    "cut off": (cut, r"model\.safetensors: not a whole safetensors file"),
    "a broken header": (written("model.safetensors", b"\xff" * 64), r"model\.safetensors: not a whole safetensors file"),
    "other shapes": (
        said(hidden_size=16),
        r"has shape \(.*\), Bert.* has \(.*by config\.json \(and \d+ more\)",
    ),
    "no head": (
        headless,
        r"lacks classifier\.bias, which Bert\w+ needs \(and 1 more\), and which would be random",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_right(case: str, save: Save) -> None:
    change, message = REFUSED[case]
    folder = save("bert")
    change(folder)
    with pytest.raises(PrunekitError, match=message) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_no_head_says_that_it_would_be_random(save: Save) -> None:
    with pytest.raises(PrunekitError, match=r"lacks classifier\.bias.* random: of a base model train that head first"):
        load_model(save("base"), "AutoModelForSequenceClassification")


def test_an_index_and_its_shards(save: Save) -> None:
    folder = save("bert", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name, file = next(iter(whole["weight_map"].items()))

    def refused(message: str) -> None:
        with pytest.raises(PrunekitError, match=message):
            load_model(folder)

    index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], "no.such": file}}))
    refused(rf"{file}: lacks no\.such, which model\.safetensors\.index\.json says it holds")
    index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], name: "../x.safetensors"}}))
    refused(r"names the shard '\.\./x\.safetensors'")
    index.write_text("{}")
    refused(r"not an index of shards, which has a weight_map")
    index.write_text(json.dumps(whole))
    (folder / file).unlink()
    refused(rf": lacks {file} of \d+ shards")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "give factory"),
        ({"factory": "a:b", "pretrained": "x"}, "give factory"),
        ({"pretrained": "x", "args": {"a": 1}}, "args are a factory's"),
        ({"factory": "a:b", "auto": "AutoModel"}, "auto goes with pretrained"),
        ({"pretrained": "x", "auto": "os.system"}, "it must be a class of transformers"),
        ({"pretrained": "x", "autos": "AutoModel"}, "did you mean auto"),
    ],
)
def test_a_recipes_section(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.of({"model": model}, "mine.yaml")


def test_an_auto_that_does_not_exist_or_fit(save: Save) -> None:
    folder = save("bert")
    with pytest.raises(UsageError, match=r"auto is 'AutoModelForSequencing', which transformers .* did you mean"):
        load_model(folder, "AutoModelForSequencing")
    with pytest.raises(UsageError, match="model_type bert has no AutoModelForImageClassification"):
        load_model(folder, "AutoModelForImageClassification")


def test_the_command_line_refuses_what_does_not_go_together(save: Save, cli: Cli, tmp_path: Path) -> None:
    folder, out = save("bert"), tmp_path / "run"
    for arguments, message in (
        ((), "import needs --model module:function, or --hf DIR"),
        (("--hf", folder, "--model", "a:b"), "one of them"),
        (("--model", "a:b", "--weights", "x", "--auto", "AutoModel"), "--auto goes with --hf"),
        (("--hf", folder, "--model-args", '{"a": 1}'), "--model-args are a factory's"),
        (("--hf", folder, "--hf", folder, "--weights", "x"), "--hf gives 2 checkpoints already"),
        (("--hf", tmp_path / "none"), "none: no such folder"),
    ):
        done = cli("import", *arguments, "--out", out)
        assert done.code in (1, 2)
        assert message in done.err
        assert len(done.err.splitlines()) == 1
        assert not (out / "recipe.yaml").exists()


def test_a_plain_install_says_what_to_install(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("bert")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"this needs transformers, which is not installed; pip install 'prunekit\[hf\]'"):
        new_model(folder)
