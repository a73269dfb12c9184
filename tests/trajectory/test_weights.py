"""Weights that somebody else saved are found in whatever form, or the message says what is there instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit import ArtifactError, Trajectory
from prunekit.trajectory import load_into, read_weights, write_checkpoints


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = net()


def sharded(folder: Path, state: Mapping[str, Tensor], suffix: str = "safetensors") -> Path:
    names = list(state)
    table = {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-0000{number + 1}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        if suffix == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        table |= dict.fromkeys(part, file)
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return path


def same(state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    assert state.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(state[name], tensor), name


def test_shards_folders_and_pickled_state_dicts_are_read(tmp_path: Path) -> None:
    model = net()
    state = model.state_dict()
    for name in ("shards", "folder", "bins"):
        (tmp_path / name).mkdir()
    same(read_weights(sharded(tmp_path / "shards", state)), model)
    same(read_weights(tmp_path / "shards"), model)
    same(read_weights(sharded(tmp_path / "bins", state, "bin")), model)
    save_file(state, tmp_path / "folder" / "model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "folder" / "adapter.safetensors")
    same(read_weights(tmp_path / "folder"), model)
    for content in (state, {"state_dict": state, "epoch": 3}, {"model": state, "args": {"lr": 0.1}, "optimizer": {"state": {}}}):
        torch.save(content, tmp_path / "x.pt")
        same(read_weights(tmp_path / "x.pt"), model)


class Strange:
    pass


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda p: torch.save(net(), p / "m.pt"), r"m\.pt: holds an object of .*runs no code"),
        (
            lambda p: torch.save({"state_dict": net().state_dict(), "cfg": Strange()}, p / "m.pt"),
            r"Strange, and prunekit runs no code",
        ),
        (lambda p: torch.save(torch.zeros(3), p / "m.pt"), r"holds a Tensor, not a state dict"),
        (lambda p: torch.save({"epoch": 3}, p / "m.pt"), r"no state dict in it.*its keys are epoch"),
        (lambda p: (p / "m.pt").write_bytes(b"garbage"), r"m\.pt: (torch\.load cannot read it|holds more than tensors)"),
        (lambda p: (p / "m.pt").write_bytes(b""), r"m\.pt: torch\.load cannot read it"),
        (lambda p: (p / "m.pt").mkdir(), r"m\.pt: a folder without weights"),
        (lambda p: None, r"m\.pt: no such file"),
    ],
)
def test_what_is_no_state_dict_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Any], fault: str) -> None:
    make(tmp_path)
    with pytest.raises(ArtifactError, match=fault) as found:
        read_weights(tmp_path / "m.pt")
    assert "\n" not in str(found.value)


def test_folders_that_need_a_choice_say_so(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ArtifactError, match=r"holds 2 of them \(a\.safetensors, b\.safetensors\); name one"):
        read_weights(tmp_path)
    (tmp_path / "bin").mkdir()
    torch.save({}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"no safetensors file, but pytorch_model\.bin; name that file"):
        read_weights(tmp_path / "bin")


def test_damaged_shards_are_refused_by_name(tmp_path: Path) -> None:
    index = sharded(tmp_path, net().state_dict())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00002\.safetensors: no such file"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"x": "../model-00001-of-00002.safetensors"}}))
    with pytest.raises(ArtifactError, match="shards lie beside their index"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ArtifactError, match="lacks x"):
        read_weights(index)
    index.write_text("{}")
    with pytest.raises(ArtifactError, match="not an index of shards"):
        read_weights(index)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.", ""])
@pytest.mark.parametrize("build", [net, Held])
def test_prefixes_of_wrappers_are_seen_through(tmp_path: Path, prefix: str, build: Callable[[], nn.Module]) -> None:
    trained, model = net(), build()
    save_file({prefix + name: tensor for name, tensor in trained.state_dict().items()}, tmp_path / "m.safetensors")
    write_checkpoints(tmp_path / "t", model, [tmp_path / "m.safetensors"])
    same(getattr(model, "model", model).state_dict(), trained)
    assert Trajectory(tmp_path / "t").layout.total == sum(p.numel() for p in model.parameters()) + 16


def test_names_that_do_not_fit_are_named_as_they_are_in_the_file(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in net().state_dict().items()}
    save_file({**state, "module.head.bias": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"m\.safetensors: has module\..*which the model does not"):
        write_checkpoints(tmp_path / "t", net(), [tmp_path / "m.safetensors"])
    del state["module.2.bias"]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks 2\.bias"):
        write_checkpoints(tmp_path / "u", net(), [tmp_path / "m.safetensors"])


def test_quantised_weights_are_not_taken_for_numbers() -> None:
    state = {**net().state_dict(), "0.weight": torch.zeros(8, 4, dtype=torch.int8)}
    with pytest.raises(ArtifactError, match=r"0\.weight is torch\.int8.*not quantised"):
        load_into(net(), state, Path("x"))


def test_masks_of_torch_go_into_plain_weights() -> None:
    masked, plain = net(), net()
    torch_prune.random_unstructured(masked[0], "weight", 0.5)
    load_into(plain, masked.state_dict(), Path("x"))
    assert torch.equal(plain[0].weight, masked[0].weight)


def test_a_model_on_the_meta_device_gets_its_numbers() -> None:
    trained = net()
    with torch.device("meta"):
        model = net()
    load_into(model, trained.state_dict(), Path("x"))
    same(model.state_dict(), trained)
    assert all(p.requires_grad for p in model.parameters())
    with torch.device("meta"):
        model = net()
        model.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ArtifactError, match="table is on the meta device and has no numbers there"):
        load_into(model, trained.state_dict(), Path("x"))


def test_tied_weights_that_differ_in_a_file_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].weight = model[0].weight
    with pytest.raises(ArtifactError, match=r"0\.weight and 1\.weight are tied in the model and differ"):
        load_into(model, state, Path("x"))
    del state["0.weight"]
    load_into(model, state, Path("x"))
    assert torch.equal(model[0].weight, state["1.weight"])
