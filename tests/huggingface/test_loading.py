"""A model out of its folder is the one that ``from_pretrained`` gives, bit for bit; sharded or not, in the checkpoint's type."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from prunekit.errors import Note
from prunekit.huggingface import load_model, new_model
from tests.huggingface.conftest import MODELS, Save, transformers

IDS = torch.randint(4, 64, (3, 8), generator=torch.Generator().manual_seed(9))


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS)[0]
    return found


@pytest.mark.parametrize("kind", ["bert", "base", "llama", "gpt2", "mixtral"])
def test_outputs_are_those_of_from_pretrained(kind: str, save: Save) -> None:
    folder = save(kind)
    theirs = getattr(transformers, MODELS[kind][0]).from_pretrained(folder)
    ours = load_model(folder)
    assert type(ours) is type(theirs)
    assert not ours.training
    assert torch.equal(answer(ours), answer(theirs))


def test_shards_give_the_same_model(save: Save) -> None:
    whole, sharded = save("llama"), save("llama", "sharded", max_shard_size="20KB")
    assert not (sharded / "model.safetensors").exists()
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(answer(load_model(whole)), answer(load_model(sharded)))


def test_weights_go_straight_to_a_device(save: Save) -> None:
    pytest.importorskip("accelerate")
    folder = save("llama")
    assert torch.equal(answer(load_model(folder, device="cpu")), answer(load_model(folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_checkpoints_type_is_kept(dtype: torch.dtype, save: Save) -> None:
    folder = save("llama", dtype=dtype)
    assert {p.dtype for p in load_model(folder).parameters()} == {dtype}
    assert {p.dtype for p in new_model(folder).parameters()} == {dtype}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}))
    assert {p.dtype for p in load_model(folder).parameters()} == {dtype}  # as the weights are


def test_tied_weights_stay_one(save: Save) -> None:
    for model in (load_model(save("llama")), new_model(save("llama"))):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_class_by_auto(save: Save) -> None:
    folder = save("bert")
    assert type(load_model(folder, "AutoModelForSequenceClassification")).__name__ == "BertForSequenceClassification"
    with pytest.warns(Note, match=r"BertModel has no place for classifier\.bias \(and 1 more\); left out"):
        base = load_model(folder, "AutoModel")
    assert torch.equal(base.embeddings.word_embeddings.weight, load_model(folder).bert.embeddings.word_embeddings.weight)


def test_a_model_without_weights_has_the_same_shapes(save: Save) -> None:
    folder = save("gpt2")
    shapes = {name: tensor.shape for name, tensor in load_model(folder).state_dict().items()}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    made = new_model(folder)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == shapes


def test_nothing_is_printed(save: Save, capfd: pytest.CaptureFixture[str]) -> None:
    folder: Path = save("bert")
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
    assert capfd.readouterr() == ("", "")
