"""Group scores beside torch-pruning's own, on the groups and in the cases where it computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from prunekit import Scores, Trajectory, score
from prunekit.structure import ChannelGroup, channel_groups
from tests.conftest import record, tiny_data

NETS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    ),
}
Case = tuple[nn.Module, Trajectory, tuple[Tensor, Tensor]]


@pytest.fixture(params=list(NETS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    torch.manual_seed(0)
    model = NETS[request.param]()
    data = tiny_data(24)
    return model, record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), data=data), data


def beside(case: Case, importance: tp.importance.Importance) -> Iterator[tuple[ChannelGroup, Tensor]]:
    model, _, (x, y) = case
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    names = {module: name for name, module in model.named_modules()}
    ours = {group.name: group for group in channel_groups(model, x[:1])}
    for group in graph.get_all_groups():
        name = names[group[0].dep.target.module]
        if name in ours:
            yield ours[name], importance(group)


def scored(case: Case, name: str) -> Scores:
    model, trajectory, data = case
    return score(trajectory, model, [data], name)


def test_magnitude(case: Case) -> None:
    l2, l1 = scored(case, "magnitude"), scored(case, "magnitude(group=l1)")
    for p, found in ((2, l2), (1, l1)):
        theirs = tp.importance.MagnitudeImportance(p=p, group_reduction="sum", normalizer=None)
        groups = list(beside(case, theirs))
        assert len(groups) == 2
        for group, expected in groups:
            torch.testing.assert_close(found.group(group.members) ** p, expected)


def test_lamp(case: Case) -> None:
    found = scored(case, "lamp")
    for group, expected in beside(case, tp.importance.LAMPImportance(p=2)):
        torch.testing.assert_close(found.group(group.members).float(), expected)


def test_taylor_of_weights_by_themselves_is_our_snip(case: Case) -> None:
    theirs = tp.importance.TaylorImportance(group_reduction="sum", normalizer=None, multivariable=False)
    found = scored(case, "snip")
    for group, expected in beside(case, theirs):
        torch.testing.assert_close(found.group(group.members), expected)


def test_multivariable_taylor_takes_absolute_values_layer_by_layer(case: Case) -> None:
    """Ours adds a channel's weights and bias over all layers first: removing it is one change of the loss, not several."""
    theirs = tp.importance.TaylorImportance(group_reduction="sum", normalizer=None, multivariable=True)
    found = scored(case, "taylor")
    for group, expected in beside(case, theirs):
        layers = [{key: index} for key, index in group.members.items() if "weight" in key]
        torch.testing.assert_close(torch.stack([blocks(found, one) for one in layers]).sum(0), expected)
        whole = found.signed(group.members).mean((0, 1)).abs()
        torch.testing.assert_close(found.group(group.members), whole)
        assert not torch.allclose(whole, expected)


def blocks(found: Scores, member: dict[str, Tensor]) -> Tensor:
    """torch-pruning adds a flattened channel's positions by absolute value too."""
    ((key, index),) = member.items()
    return torch.stack([found.signed({key: index[:, [k]]}).mean((0, 1)).abs() for k in range(index.shape[1])]).sum(0)
