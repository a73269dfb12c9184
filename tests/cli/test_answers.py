"""A pruned model whose answer is no number any more is refused before it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit import NonFiniteError
from prunekit.apply.answers import check_answers
from tests.cli.conftest import Cli


class Towers(nn.Module):
    """Two embeddings of length 1, of which a task may count one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        second = self.second(x)
        return {"first": self.first(x), "second": second / second.norm(dim=-1, keepdim=True)}


def data() -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return {name: (torch.randn(12, 6), torch.arange(12) % 4) for name in ("train", "validation", "test", "scoring")}


def test_nan_where_there_was_a_number_is_named() -> None:
    model, x = Towers(), torch.randn(3, 6)
    check_answers(model, model, x)
    broken = Towers()
    with torch.no_grad():
        broken.second.weight.zero_()
    with pytest.raises(NonFiniteError, match=r"outputs\.second holds NaN, the dense model's does not"):
        check_answers(model, broken, x)
    check_answers(broken, broken, x)


@pytest.mark.slow
def test_prune_writes_no_such_model(cli: Cli, tmp_path: Path) -> None:
    save_file(Towers().state_dict(), tmp_path / "weights.safetensors")
    run, here = tmp_path / "run", __name__
    task = json.dumps({"name": "classification", "output": "first"})
    made = cli("import", "--model", f"{here}:Towers", "--weights", tmp_path / "weights.safetensors", "--data", f"{here}:data",
               "--task", task, "--out", run)  # fmt: skip
    assert made.code == 0, made.err
    assert cli("score", run, "-c", "taylor").code == 0  # of which the second tower has none
    done = cli("prune", run, "-c", "taylor", "-s", 0.6, "--name", "small")
    assert done.code == 1
    assert "the pruned model's outputs.second holds NaN" in done.err
    assert not (run / "pruned" / "small" / "model.safetensors").exists()
    steps = cli("prune", run, "-c", "taylor", "-s", 0.6, "--name", "small", "--schedule", "iterative", "--rounds", 2)
    assert steps.code == 1
    assert "the pruned model's outputs.second holds NaN" in steps.err
    assert not (run / "pruned" / "small").exists()
    assert cli("prune", run, "-c", "taylor", "-s", 0.6, "--name", "small", "--floor", 0.2).code == 0
