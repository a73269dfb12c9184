"""Experts that make up for what their mixture lacks, against plain least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import NonFiniteError, Trajectory, make_plan, score
from prunekit.apply import layerwise, masked
from prunekit.apply.surgery import cut_units
from prunekit.batch import call
from tests.blocks.models import family

WIDTH, NEURONS = 5, 4


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * NEURONS, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(experts, WIDTH, NEURONS))
        self.act_fn = nn.SiLU()
        self.factor = 1.0

    def neurons(self, x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
        found: Tensor = self.act_fn(gate) * up
        return found

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            tokens, place = torch.where(chosen == expert)
            out = F.linear(self.neurons(x[tokens], expert), self.down_proj[expert]) * weights[tokens, place, None]
            found.index_add_(0, tokens, self.factor * out)
        return found


class Model(nn.Module):
    """A layer and a mixture that write into a stream; a token goes to ``top`` experts."""

    def __init__(self, top: int, experts: int = 3) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, experts)
        self.experts, self.top = Experts(experts), top

    def routed(self, h: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(h).softmax(-1).topk(self.top)
        return chosen, weights

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(x)
        found: Tensor = h + self.experts(h.flatten(0, 1), *self.routed(h.flatten(0, 1))).view(h.shape)
        return found


def case(top: int) -> tuple[Any, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model, x = Model(top).double(), torch.randn(30, 6, WIDTH, dtype=torch.float64)
    masks = {"first.weight": torch.rand(WIDTH, WIDTH) < 0.5, "experts.down_proj": torch.ones(3, WIDTH, NEURONS).bool()}
    masks["experts.down_proj"][1, :, 2] = False  # a neuron less
    return model, masks, x


def features(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The stream before the mixture, and all experts' weighted neurons beside each other, ``(tokens, experts · neurons)``."""
    h = (x + model.first(x)).flatten(0, 1)
    chosen, weights = model.routed(h)
    found = torch.zeros(len(h), 3, NEURONS, dtype=h.dtype)
    for expert in range(3):
        share = torch.where(chosen == expert, weights, 0).sum(1, keepdim=True)
        found[:, expert] = model.experts.neurons(h, expert) * share
    return h, found.flatten(1)


@pytest.mark.parametrize("top", [1, 2])
def test_experts_bring_the_sum_back(top: int) -> None:
    """A token of one expert alone says all about that one's share: least squares, exactly. Of two they come near it."""
    model, masks, x = case(top)
    found: Any = layerwise(model, masks, [(x[:10], None), (x[10:], None)], damping=0)
    with torch.no_grad():
        stream, neurons = features(found, x)
        wanted = model(x).flatten(0, 1) - stream
        open_ = masks["experts.down_proj"].any(1).flatten()
        best = torch.zeros(3 * NEURONS, WIDTH, dtype=torch.float64)
        best[open_] = torch.linalg.lstsq(neurons[:, open_], wanted).solution

        def error(weight: Tensor) -> float:
            return float((neurons @ weight.transpose(1, 2).reshape(-1, WIDTH) - wanted).square().sum())

        least = error(best.view(3, NEURONS, WIDTH).transpose(1, 2))
        before = error(model.experts.down_proj * masks["experts.down_proj"])
        assert not found.experts.down_proj[~masks["experts.down_proj"]].any()
        if top == 1:
            torch.testing.assert_close(found.experts.down_proj.transpose(1, 2).reshape(-1, WIDTH), best)
        assert error(found.experts.down_proj) - least < 0.1 * (before - least)


def test_what_is_not_as_its_layers_say_stays_as_it_is() -> None:
    model, masks, x = case(2)
    model.experts.factor = 0.5
    found: Any = layerwise(model, masks, [(x, None)])
    assert torch.equal(found.experts.down_proj, model.experts.down_proj * masks["experts.down_proj"])
    assert not torch.equal(found.first.weight, model.first.weight * masks["first.weight"])


def test_an_expert_of_uneven_outputs_stays_as_it_is() -> None:
    model, masks, x = case(1)
    masks["experts.down_proj"][0, 1, 1] = False
    found: Any = layerwise(model, masks, [(x, None)])
    assert torch.equal(found.experts.down_proj[0], (model.experts.down_proj * masks["experts.down_proj"])[0])
    assert not torch.equal(found.experts.down_proj[2], model.experts.down_proj[2])


def test_a_model_without_some_experts_is_nearer_to_the_dense_one() -> None:
    model, batches = family("mixtral", samples=40)
    model.float()  # torch's products of grouped matrices take no float64
    plan = make_plan(
        score(Trajectory.of(model), model, criterion="magnitude"), model, batches[0][0], sparsity=0.3, structure="experts"
    )
    small = cut_units(layerwise(model, plan, batches, task="unlabelled"), plan, batches[0][0])
    plain = masked(model, plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())

    def apart(other: nn.Module) -> float:
        with torch.no_grad():
            one, two = (torch.cat([call(m, x).logits.log_softmax(-1) for x, _ in batches]) for m in (model, other))
        return float((one.exp() * (one - two)).sum(-1).mean())

    assert 0 < apart(small) < apart(plain)


@pytest.mark.parametrize("where", [0, 20])
def test_inputs_that_are_no_numbers_are_refused(where: int) -> None:
    model, masks, x = case(2)
    x[where] = torch.nan
    del masks["first.weight"]
    with pytest.raises(NonFiniteError, match="down_proj"):
        layerwise(model, masks, [(x[:10], None), (x[10:], None)])


def test_a_stream_that_is_changed_in_place_is_the_same_stream() -> None:
    class InPlace(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = (x + self.first(x)).flatten(0, 1)
            h += self.experts(h, *self.routed(h))
            return h.view(x.shape)

    model, masks, x = case(2)
    other = InPlace(2).double()
    other.load_state_dict(model.state_dict())
    found: Any = layerwise(model, masks, [(x, None)])
    same: Any = layerwise(other, masks, [(x, None)])
    torch.testing.assert_close(found.experts.down_proj, same.experts.down_proj)
    assert not torch.equal(found.experts.down_proj, model.experts.down_proj * masks["experts.down_proj"])
