"""Groups of channels: complete, exact, and refused by name where they are not handled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit import StructureError
from prunekit.models import digits_cnn
from prunekit.structure import channel_groups
from tests.structure_models import HANDLED, IMAGES, REFUSED


def test_digits_cnn() -> None:
    groups = {g.name: g for g in channel_groups(digits_cnn(), torch.randn(2, 1, 8, 8))}
    assert {n: g.size for n, g in groups.items()} == {"conv1": 32, "conv2": 64, "conv3": 64}
    assert set(groups["conv3"].members) == {"conv3.weight@0", "conv3.bias@0", "classifier.weight@1"}


@pytest.mark.parametrize("name", HANDLED)
def test_a_channel_and_its_members_are_all_that_carry_it(name: str) -> None:
    """Zeroing what the index of a channel names leaves no trace of it: later layers no longer depend on it."""
    torch.manual_seed(0)
    model = HANDLED[name]().eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in channel_groups(model, IMAGES):
        for member, index in group.members.items():
            parameter, axis = member.rsplit("@", 1)
            assert index.shape[0] == group.size
            assert int(index.max()) < tensors[parameter].shape[int(axis)]
            assert len(index.unique()) == index.numel()


def test_flattening_gives_blocks() -> None:
    groups = {g.name: g for g in channel_groups(HANDLED["flattened"](), IMAGES)}
    index = groups["conv"].members["hidden.weight@1"]
    assert torch.equal(index, torch.arange(96).view(6, 16))


def test_added_branches_share_a_group() -> None:
    groups = channel_groups(HANDLED["residual"](), IMAGES)
    assert len(groups) == 1
    assert {m.split(".")[0] for m in groups[0].members} == {"stem", "norm", "inner", "out"}
    assert {"norm.running_mean@0", "norm.running_var@0"} <= set(groups[0].members)


def test_joined_branches_keep_their_ranges() -> None:
    groups = {g.name: g for g in channel_groups(HANDLED["joined"](), IMAGES)}
    assert groups["left"].members["mix.weight@1"].flatten().tolist() == [0, 1, 2, 3]
    assert groups["right"].members["mix.weight@1"].flatten().tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_handled_is_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(StructureError, match=message):
        channel_groups(build(), IMAGES)


def test_frozen_layers_are_seen_and_the_model_stays_as_it_was() -> None:
    model = digits_cnn()
    model.conv1.requires_grad_(False)
    model.train()
    assert {g.name for g in channel_groups(model, torch.randn(2, 1, 8, 8))} == {"conv1", "conv2", "conv3"}
    assert model.training
    assert not model.conv1.weight.requires_grad


def test_a_model_that_cannot_be_traced() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    with pytest.raises(StructureError, match="cannot be traced"):
        channel_groups(Broken(), IMAGES)
