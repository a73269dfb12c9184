"""The examples of docs/loops.md, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from prunekit import Trajectory, make_plan, score
from tests.integrations.loops import Samples, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()


def example(heading: str) -> str:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heading", ["transformers", "Lightning", "Accelerate", "Pruning while training"])
def test_example_runs(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if heading != "Pruning while training":
        pytest.importorskip(heading.lower(), reason=f"{heading} is not installed: pip install 'prunekit[hf,lightning]'")
    monkeypatch.chdir(tmp_path)
    model, data = tiny(), Samples()
    path = Trajectory.of(model)
    names: dict[str, Any] = {
        "model": model, "data": data, "loader": DataLoader(data, 4), "plan": make_plan(
            score(path, model, criterion="magnitude"), model, sparsity=0.5
        ), "optimizer": torch.optim.AdamW(model.parameters()),
    }  # fmt: skip
    if heading == "Lightning":
        from lightning.pytorch import LightningModule

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = model

            def training_step(self, batch: Any, number: int) -> Tensor:
                loss: Tensor = self.net(**batch)["loss"]
                return loss

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters())

        names["module"] = Module()
    exec(compile(example(heading), f"docs/loops.md, {heading}", "exec"), names)
    if heading != "Pruning while training":
        (folder,) = (tmp_path / "runs").iterdir()
        assert Trajectory(folder / "trajectory").complete
