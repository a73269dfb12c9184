"""uniform: blocks of a stack keep as many units as each other, whatever the importances, and what stands outside stays whole."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Plan, UsageError, make_plan, masked, prune, refine
from tests.structure_models import IMAGES, random_scores

pytestmark = pytest.mark.filterwarnings("ignore:asked for")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(x)))


class Stacked(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem, self.pooler, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, classes)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.squeeze(1))
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.pooler(x.mean(1))))


def counts(plan: Plan, names: str) -> set[int]:
    return {int(keep.sum()) for name, keep in plan.keep.items() if re.search(names, name)}


@pytest.mark.parametrize("allocation", ["global", "mean", "lamp"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_every_block_keeps_as_many(allocation: str, round_to: int) -> None:
    torch.manual_seed(0)
    model = Stacked().eval()
    scores = random_scores(model)
    for name, tensor in scores.importance.items():
        if name.startswith("blocks.1"):
            tensor /= 100  # alone it would lose nearly all
    plan = make_plan(
        scores, model, IMAGES, sparsity=0.4, structure="channels", allocation=allocation, round_to=round_to, uniform=True
    )
    neurons, heads = counts(plan, r"\.fc1$"), counts(plan, r"blocks\.\d$")
    assert len(neurons) == len(heads) == 1
    assert max(neurons) % round_to == 0
    assert plan.keep.get("pooler", torch.ones(1)).all()
    assert 0.2 < plan.sparsity()["prunable"] < 0.6
    torch.testing.assert_close(prune(model, plan, IMAGES)(IMAGES), masked(model, plan)(IMAGES), atol=1e-5, rtol=1e-4)


def test_the_least_important_of_each_block_go_first() -> None:
    torch.manual_seed(0)
    model = Stacked().eval()
    scores = random_scores(model)
    plan = make_plan(scores, model, IMAGES, sparsity=0.3, structure="neurons", uniform=True)
    for name, keep in plan.keep.items():
        members = {k.split("|")[1]: v for k, v in plan.index.items() if k.startswith(f"{name}|")}
        found = scores.group(members)
        assert found[~keep].max() < found[keep].min()


@pytest.mark.slow
def test_refining_keeps_the_numbers() -> None:
    torch.manual_seed(0)
    model = Stacked().eval()
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.4, structure="neurons", uniform=True)
    x = torch.randn(24, 1, 4, 4)
    better = refine(plan, model, [(x, model(x).argmax(1))], rounds=2, steps=2)
    assert counts(better, "fc1") == counts(plan, "fc1")


@pytest.mark.parametrize(
    ("structure", "ratios", "build", "said"),
    [
        ("layers", None, Stacked, "uniform is for channels, heads, neurons and experts, and the structure is layers"),
        ("unstructured", None, Stacked, "the structure is unstructured"),
        ("neurons", {"blocks.0*": 0.5}, Stacked, "ratios say another share"),
        ("channels", None, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), "stack, and none"),
    ],
)
def test_what_uniform_cannot_be_is_refused(structure: str, ratios: dict[str, float] | None, build: type, said: str) -> None:
    model = build()
    with pytest.raises(UsageError, match=said):
        make_plan(random_scores(model), model, IMAGES, sparsity=0.4, structure=structure, ratios=ratios, uniform=True)
