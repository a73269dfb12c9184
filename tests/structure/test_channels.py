"""Groups of channels: complete, exact, and what is not handled is left out and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit import StructureError
from prunekit.models import digits_cnn, digits_transformer
from prunekit.structure import Groups, channel_groups
from tests.structure_models import ATTENTIVE, HANDLED, IMAGES, REFUSED


def groups_of(name: str) -> Groups:
    torch.manual_seed(0)
    return channel_groups(HANDLED[name](), IMAGES)


def test_digits_cnn() -> None:
    groups = {g.name: g for g in channel_groups(digits_cnn(), torch.randn(2, 1, 8, 8))}
    assert {n: g.size for n, g in groups.items()} == {"conv1": 32, "conv2": 64, "conv3": 64}
    assert set(groups["conv3"].members) == {"conv3.weight@0", "conv3.bias@0", "classifier.weight@1"}


def test_digits_transformer_has_neurons_and_heads_and_names_its_width() -> None:
    groups = channel_groups(digits_transformer(width=16, heads=4, kv_heads=2), torch.randn(2, 1, 8, 8))
    assert {g.name: g.size for g in groups} == {
        "layers.0.up": 64, "layers.1.up": 64, "layers.0.attention": 2, "layers.1.attention": 2,
    }  # fmt: skip
    assert len(groups.refused) == 1
    assert "is a LayerNorm" in next(iter(groups.refused.values()))


@pytest.mark.parametrize("name", HANDLED)
def test_members_are_places_that_exist_and_no_place_is_taken_twice(name: str) -> None:
    torch.manual_seed(0)
    model = HANDLED[name]().eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    taken: dict[str, list[int]] = {}
    for group in channel_groups(model, IMAGES):
        for member, index in group.members.items():
            parameter, axis = member.rsplit("@", 1)
            assert index.shape[0] == group.size
            assert int(index.max()) < tensors[parameter].shape[int(axis)]
            taken.setdefault(member, []).extend(index.flatten().tolist())
    assert taken
    for places in taken.values():
        assert len(places) == len(set(places))


def test_flattening_gives_blocks() -> None:
    groups = {g.name: g for g in groups_of("flattened")}
    assert torch.equal(groups["conv"].members["hidden.weight@1"], torch.arange(96).view(6, 16))


def test_added_branches_share_a_group() -> None:
    groups = groups_of("residual")
    assert len(groups) == 1
    assert {m.split(".")[0] for m in groups[0].members} == {"stem", "norm", "inner", "out"}
    assert {"norm.running_mean@0", "norm.running_var@0"} <= set(groups[0].members)


def test_joined_branches_keep_their_ranges() -> None:
    groups = {g.name: g for g in groups_of("joined")}
    assert groups["left"].members["mix.weight@1"].flatten().tolist() == [0, 1, 2, 3]
    assert groups["right"].members["mix.weight@1"].flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_a_wide_branch_added_to_two_joined_ones_is_split_between_them() -> None:
    places = {tuple(g.members["wide.weight@0"].flatten().tolist()): set(g.members) for g in groups_of("partly joined")}
    assert set(places) == {(0, 1, 2, 3), (4, 5, 6)}
    assert "left.weight@0" in places[0, 1, 2, 3]
    assert "right.weight@0" not in places[0, 1, 2, 3]
    assert "right.weight@0" in places[4, 5, 6]


def test_a_grouped_convolution_loses_the_same_places_in_each_group() -> None:
    groups = {g.name: g for g in groups_of("grouped")}
    assert groups["one"].members["one.weight@0"].tolist() == [[0, 2], [1, 3]]
    assert groups["one"].members["two.weight@1"].tolist() == [[0], [1]]
    assert groups["two"].members["two.weight@0"].tolist() == [[0, 2], [1, 3]]


def test_a_depthwise_convolution_leaves_with_its_producer() -> None:
    groups = {m: g for g in groups_of("depthwise") for m in g.members}
    group = groups["depth.weight@0"]
    assert {"point.weight@0", "norm.weight@0", "depth.bias@0", "mix.weight@1"} <= set(group.members)
    assert group.attributes == {"depth:groups": 1, "norm:num_features": 1}


def test_a_group_norm_loses_whole_groups() -> None:
    groups = {g.name: g for g in groups_of("group norm")}
    assert groups["conv"].members["norm.weight@0"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert groups["conv"].attributes == {"norm:num_channels": 2, "norm:num_groups": 1}
    assert groups["mix"].size == 5


def test_constraints_of_several_layers_add_up() -> None:
    """Places of the groups (c and c + 4) and norm groups (2k and 2k + 1) together: two units of four channels."""
    groups = {g.name: g for g in groups_of("grouped, normed")}
    assert groups["two"].members["norm.weight@0"].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_tied_layers_are_left_whole_and_named() -> None:
    groups = groups_of("partly tied")
    assert [g.name for g in groups] == ["three"]
    assert "tied to" in groups.refused["one"]
    assert "tied to" in groups.refused["two"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_handled_is_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(StructureError, match=message):
        channel_groups(build(), IMAGES)


@pytest.mark.parametrize("build", [digits_cnn, lambda: digits_transformer(width=8, hidden=6)])
def test_frozen_layers_are_seen_and_the_model_stays_as_it_was(build: object) -> None:
    model = build()  # type: ignore[operator]
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    first.requires_grad_(False)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = {g.name for g in channel_groups(build(), torch.randn(2, 1, 8, 8))}  # type: ignore[operator]
    assert {g.name for g in channel_groups(model, torch.randn(2, 1, 8, 8))} == expected
    assert model.training
    assert not first.weight.requires_grad
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_that_does_not_run() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    with pytest.raises(StructureError, match=r"does not run on the example inputs \(2, 1, 4, 4\).*RuntimeError: no"):
        channel_groups(Broken(), IMAGES)


def test_a_model_that_cannot_be_traced() -> None:
    class Detached(nn.Module):
        """No gradient leads from its outputs to its weights."""

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x).detach()

    with pytest.raises(StructureError, match="channels"):
        channel_groups(Detached(), IMAGES)


def test_attention_projections_are_no_channels_of_their_own() -> None:
    torch.manual_seed(0)
    groups = channel_groups(ATTENTIVE["separate"](), IMAGES)
    assert {g.name for g in groups} == {"attention"}
