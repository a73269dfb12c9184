"""compress --offload: blocks come from files one at a time, and become the very weights that pruning in memory finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.zoo.operators import declare
from prunekit import UsageError, prune_layerwise
from prunekit.blocks import InFiles
from prunekit.blocks.held import Hidden
from prunekit.data import Samples
from prunekit.huggingface import load_model, quietly
from prunekit.layerwise import Asked, Pruning
from prunekit.task import get_task
from tests.cli.conftest import Cli
from tests.huggingface.conftest import Save
from tests.huggingface.test_import import done

declare()
transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **TEXT, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {**TEXT, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 32}
CASES = {
    "llama": ("Llama", {**LLAMA, "tie_word_embeddings": False}, {}),
    "llama, tied and sharded": ("Llama", {**LLAMA, "tie_word_embeddings": True}, {"max_shard_size": 4000}),
    "gpt2, sharded": ("GPT2", GPT2, {"max_shard_size": 6000}),
    "mixtral, whose experts lie otherwise in files": ("Mixtral", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}, {}),
}
KINDS = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel", "Mixtral": "MixtralForCausalLM"}


def saved(folder: Path, kind: str, options: dict[str, Any], how: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, KINDS[kind])(getattr(transformers, f"{kind}Config")(**options))
    model.to(dtype).save_pretrained(folder, **how)
    return folder


def windows() -> list[tuple[dict[str, Tensor], Tensor]]:
    ids = torch.randint(3, 40, (12, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::3, :3] = 0
    return [({"input_ids": ids, "attention_mask": mask}, ids)]


def pruned_in_files(folder: Path, place: Path, activations: int = 2**31, **asked: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model after pruning, its weights in files, and what stays."""
    place.mkdir()
    model = load_model(folder, offload=place)
    data = Samples.of(windows(), get_task("causal_lm").batch)
    with torch.no_grad():
        home = InFiles(model, torch.device("cpu"), place)
        pruning = Pruning(model, Asked(activations=activations, **asked), data, home, spill=place)
        keep = {name: solved.keep for name, solved in pruning}
    return model, keep


@pytest.mark.parametrize("case", CASES)
def test_weights_and_masks_are_those_of_pruning_in_memory(case: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", *CASES[case])
    plan, small = prune_layerwise(load_model(folder), windows(), method="sparsegpt", sparsity=0.5, task="causal_lm")
    model, keep = pruned_in_files(folder, tmp_path / "files", method="sparsegpt", sparsity=0.5)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert keep.keys() == plan.keep.keys()
    assert all(torch.equal(keep[name], mask) for name, mask in plan.keep.items())
    with torch.no_grad():
        assert torch.equal(model(**windows()[0][0]).logits, small(**windows()[0][0]).logits)  # read from what was written
    with quietly():
        model.save_pretrained(tmp_path / "out", max_shard_size=5000)
    back = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_activations_beyond_their_bytes_lie_on_the_disk_and_change_nothing(method: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", *CASES["llama"], dtype=torch.bfloat16)
    _, held = pruned_in_files(folder, tmp_path / "held", method=method, structure="2:4")
    model, spilt = pruned_in_files(folder, tmp_path / "spilt", activations=1, method=method, structure="2:4")
    assert all(torch.equal(spilt[name], mask) for name, mask in held.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_hidden_states_come_back_from_memory_and_file_as_they_went(tmp_path: Path) -> None:
    hidden, states = Hidden(torch.device("cpu"), 100, tmp_path), [torch.randn(3, n, dtype=torch.float64) for n in (4, 2, 5)]
    for tensor in states:
        hidden.add(tensor)
    assert [torch.equal(hidden[n], tensor) for n, tensor in enumerate(states)] == [True] * 3
    for number, tensor in enumerate([torch.randn(3, 4), torch.randn(2, 2), torch.randn(9, 9).bfloat16()]):
        hidden[number] = tensor
        assert torch.equal(hidden[number], tensor)
    assert torch.equal(hidden[1], hidden[1])
    assert os.listdir(tmp_path) == []  # the file has no name


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", *CASES["llama"])
    (tmp_path / "files").mkdir()
    model = load_model(folder, offload=tmp_path / "files")
    data, home = Samples.of(windows(), get_task("causal_lm").batch), InFiles(model, torch.device("cpu"), tmp_path / "files")
    with torch.no_grad():
        for name, _ in Pruning(model, Asked("wanda", 0.5), data, home):
            block = ".".join(name.split(".")[:3])
            here = [other for other, parameter in model.named_parameters() if not parameter.is_meta]
            assert here
            assert all(other.startswith(f"{block}.") for other in here)


def test_weights_that_no_hook_reads_are_refused() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="the weights of 0 are in no file"):
        InFiles(model, torch.device("cpu"), Path())


def test_the_command_writes_a_folder_that_from_pretrained_loads(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    folder, out = save("llama", max_shard_size=20000), tmp_path / "small"
    (folder / "tokenizer_config.json").write_text("{}")
    asked = ("compress", folder, "--data", f"{words}:texts", "--layerwise", "sparsegpt", "--offload", "--out", out)
    printed = done(cli, *asked, "--activations", "1KiB")
    assert "layer by layer: sparsegpt, from 48 training samples; kept weights have new values" in printed
    data = {"input_ids": torch.randint(4, 64, (48, 8), generator=torch.Generator().manual_seed(0))}  # the module's
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    _, small = prune_layerwise(load_model(folder), [(data, None)], sparsity=0.5, task="unlabelled")
    state = load_model(out).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())
    assert {path.name for path in out.iterdir()} >= {"tokenizer_config.json", "README.md", "export.json", "config.json"}
    assert not any(path.name.startswith(".") for path in out.iterdir())
    told = json.loads(done(cli, *asked, "--json"))  # how much of the hidden states is in memory decides nothing
    assert told["export"]["reused"] is True
    assert told["achieved"]["prunable"] == 0.5
    assert told["pruned"]["perplexity"] - told["dense"]["perplexity"] == pytest.approx(told["lost"]["lost"])
    assert sum(layer["total"] - layer["kept"] for layer in told["layers"].values()) == told["parameters"]["removed"]
    other = cli(*asked, "-s", 0.6)
    assert other.code == 1
    assert "sparsity was 0.5, is now 0.6" in other.err
    assert torch.equal(
        load_model(out).state_dict()["model.layers.1.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--offload",), "name a method, such as --layerwise sparsegpt"),
        (("--layerwise", "wanda", "--activations", "1GiB"), "give both"),
        (("--layerwise", "wanda", "--offload", "--activations", "much"), "'much' is no amount of memory"),
        (("--layerwise", "wanda", "--offload", "--dry-run"), "--dry-run tries the model in memory"),
        (("--layerwise", "wanda", "--offload", "--refine"), "--refine looks at the whole model at once"),
        (("--layerwise", "wanda", "--offload", "--structure", "heads"), "layer-wise methods remove single weights"),
        (("--layerwise", "wanda", "--offload", "--ignore", "modl.*"), "'modl.*' matches no parameter"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    options: tuple[str, ...], message: str, save: Save, words: str, cli: Cli, tmp_path: Path
) -> None:
    found = cli("compress", save("llama"), "--data", f"{words}:texts", "--out", tmp_path / "small", *options)
    assert found.code == 2
    assert message in found.err
    assert not (tmp_path / "small").exists()


def test_a_model_that_is_no_row_of_blocks_is_refused(words: str, cli: Cli, tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        num_labels=3,
    )  # fmt: skip
    transformers.AlbertForSequenceClassification(config).save_pretrained(tmp_path / "albert")
    asked = ("--data", f"{words}:classes", "--layerwise", "wanda", "--offload", "--out", tmp_path / "small")
    found = cli("compress", tmp_path / "albert", *asked, "--task", "classification")
    assert found.code == 2
    assert "is no row of blocks that hand their outputs on" in found.err
    assert not (tmp_path / "small").exists()


def test_a_disk_without_room_is_said_first(
    save: Save, words: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    asked = ("--data", f"{words}:texts", "--layerwise", "wanda", "--offload", "--out", tmp_path / "small")
    found = cli("compress", save("llama"), *asked)
    assert found.code == 1
    assert "0 MB are free; choose another --out" in found.err
