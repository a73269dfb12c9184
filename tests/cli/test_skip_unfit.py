"""score --skip-unfit: what wanda and obs cannot look at is scored by magnitude, and that is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

TAGGER = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(torch.relu(self.hidden(self.embedding(ids))))

def build():
    return Tagger()

def data():
    def split(n, seed):
        ids = torch.randint(0, 12, (n, 5), generator=torch.Generator().manual_seed(seed))
        return ids, ids % 3
    return {name: split(n, s) for s, (name, n) in enumerate({"train": 16, "validation": 8, "test": 8, "scoring": 6}.items())}
"""
RECIPE = """
threads: 1
model: {factory: "skip_unfit_tagger:build"}
data: {factory: "skip_unfit_tagger:data"}
task: token_classification
train: {optimizer: {name: sgd, lr: 0.05}, epochs: 1, batch_size: 8}
"""


@pytest.fixture
def tagger(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "skip_unfit_tagger.py").write_text(TAGGER)
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = cli("train", "r.yaml", "--out", "run")
    assert done.code == 0, done.err
    return tmp_path / "run"


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_an_embedding_is_refused_by_name_and_scored_by_magnitude_where_that_is_asked(
    tagger: Path, cli: Cli, criterion: str
) -> None:
    refused = cli("score", tagger, "-c", criterion)
    assert refused.code == 1
    assert "embedding.weight (Embedding)" in refused.err
    assert "--skip-unfit" in refused.err
    done = cli("score", tagger, "-c", criterion, "--skip-unfit")
    assert done.code == 0, done.err
    assert re.search(
        rf"scored by magnitude, times \S+, since {criterion} has nothing to look at there: embedding.weight \(Embedding\)",
        done.out,
    )
    again = json.loads(cli("score", tagger, "-c", criterion, "--skip-unfit", "--json").out)
    assert again[0]["reused"]
    assert cli("prune", tagger, "-c", criterion, "-s", 0.5, "--name", "half").code == 0
