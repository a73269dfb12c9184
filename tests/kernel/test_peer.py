"""The paper authors' own code on the same run gives the same scores."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from prunekit.data import digits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("explaind") is None or importlib.util.find_spec("tqdm") is None,
    reason="explaind is not installed: pip install --no-deps --ignore-requires-python explaind==0.1.0 tqdm",
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["sgd", "adamw"])
def test_same_nodes_same_scores(tmp_path: Path, number: int) -> None:
    from benchmarks import explaind_peer as bench

    splits = digits(**bench.SPLITS)
    x, y = (t[:100] for t in splits["train"])
    xs, ys = (t[:2] for t in splits["scoring"])
    model, peer = bench.train(bench.CASES[number], 6, 1, x, y, tmp_path / "path", peer=True)
    assert peer is not None
    ours = bench.Ours(tmp_path / "path", model, x, y)
    rebuilt, scores, data = peer.explain(xs, 3, matrix=True)
    found = ours.parameters(xs, ys, 3)
    assert (found - scores).norm() <= 1e-4 * scores.norm()
    data, found = data / bench.BATCH, ours.data(xs, ys, 3)
    assert torch.corrcoef(torch.stack([data.flatten(), found.flatten()]))[0, 1] > 0.99999
    assert (found - data).norm() < 1e-3 * data.norm()
    torch.testing.assert_close(ours.rebuilt(xs, ys, 3)[0].float(), rebuilt.float(), atol=1e-4, rtol=1e-4)
