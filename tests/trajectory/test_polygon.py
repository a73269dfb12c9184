"""A path of states alone: what is kept, what was set, and what is left of one that was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from prunekit import ArtifactError, NonFiniteError, Trajectory, UsageError
from prunekit.trajectory import Polygon


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    return model


@torch.no_grad()
def moved(model: nn.Module) -> torch.Tensor:
    """The state after every trained tensor has moved a little."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model[1].running_mean.add_(0.1)
    model[1].num_batches_tracked.add_(1)
    return Trajectory.of(model).state(0).clone()


@pytest.mark.parametrize("every", [1, 3])
def test_states_are_read_back_also_while_it_is_written(tmp_path: Path, every: int) -> None:
    model = net()
    states = [Trajectory.of(model).state(0).clone()]
    with Polygon(tmp_path / "t", model, {"a": 1}, every=every) as polygon:
        for _ in range(4):
            states.append(moved(model))
            polygon.step()
        with polygon.jump():
            pass  # nothing changes: nothing is added
        with polygon.jump():
            states.append(moved(model))
        assert torch.equal(Trajectory(tmp_path / "t").state(-1), states[-1])
        for _ in range(4):
            states.append(moved(model))
            polygon.step()
    found = Trajectory(tmp_path / "t")
    found.verify()
    assert found.complete
    assert found.provenance["a"] == 1
    assert len(found) == 9
    assert [found.step(s).moved for s in range(9)] == [s != 4 for s in range(9)]
    kept = range(10) if every == 1 else (0, 3, 4, 5, 7, 9)
    assert found.kept == set(kept)
    for index in kept:
        assert torch.equal(found.state(index), states[index]), index
    jumps = [segment for segment in found.segments() if segment.jump]
    assert [segment.index for segment in jumps] == [4]
    assert torch.equal(jumps[0].regularisation, jumps[0].update)
    assert int(found.model_state(0)["1.num_batches_tracked"]) == 0
    assert int(found.model_state()["1.num_batches_tracked"]) == 9
    assert torch.equal(found.model_state()["0.bias"], model[0].bias)


def test_what_was_cut_off_opens_up_to_its_last_step(tmp_path: Path) -> None:
    model = net()
    states: list[torch.Tensor] = []

    def broken() -> None:
        with Polygon(tmp_path / "t", model) as polygon:
            for _ in range(2):
                states.append(moved(model))
                polygon.step()
            with torch.no_grad():
                model[0].weight[0, 0] = float("nan")
            polygon.step()

    with pytest.raises(NonFiniteError, match=r"step 3: 0.weight became NaN or Inf"):
        broken()
    found = Trajectory(tmp_path / "t")
    assert not found.complete
    assert len(found) == 2
    assert torch.equal(found.state(-1), states[-1])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every is 0"):
        Polygon(tmp_path / "t", net(), every=0)
    with Polygon(tmp_path / "t", net()):
        pass
    with pytest.raises(ArtifactError, match="already holds a trajectory"), Polygon(tmp_path / "t", net()):
        pass
