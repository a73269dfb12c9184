"""Experts of a mixture learnt from a stream: judged as the router chooses among those that stay, and found where a plan errs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prunekit import Plan, Trajectory, UsageError, make_plan, refine, score
from prunekit.apply import masked
from prunekit.repair.streamed import Streaming
from tests.transformer_models import built


def texts(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(3, 40, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [(tokens, tokens)]


@pytest.fixture(scope="module")
def mixture() -> nn.Module:
    """Of four experts in each layer the last two give nearly nothing."""
    model, _ = built("mixtral")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("down_proj"):
                tensor.mul_(torch.tensor([40.0, 40.0, 0.01, 0.01])[:, None, None])
    return model


@pytest.fixture(scope="module")
def wrong(mixture: nn.Module) -> Plan:
    """The last two stay."""
    scores = score(Trajectory.of(mixture), mixture, criterion="magnitude")
    plan = make_plan(scores, mixture, texts(1, 0)[0][0], sparsity=0.38, structure="experts")
    assert all(keep.tolist() == [True, True, False, False] for keep in plan.keep.values())
    return replace(plan, keep={name: ~keep for name, keep in plan.keep.items()})


def divergence(dense: nn.Module, pruned: nn.Module) -> float:
    """KL of the next token, the mean over places."""
    tokens = texts(16, 2)[0][0]
    with torch.no_grad():
        p, q = (model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1) for model in (dense, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.filterwarnings("ignore:refine. the mask fits")  # few samples judge
def test_the_experts_that_matter_come_back(mixture: nn.Module, wrong: Plan) -> None:
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    found = refine(wrong, mixture, texts(64, 1), accept=texts(16, 2), task="causal_lm", stream=Streaming(8 * 8 * 60, 8))
    assert all(keep.tolist() == [True, True, False, False] for keep in found.keep.values())
    told = found.provenance["refine"]
    for plan, figures in ((wrong, told["before"]), (found, told["after"])):
        assert figures["accept"] == pytest.approx(divergence(mixture, masked(mixture, plan)), rel=1e-4)
    assert told["after"]["accept"] < told["before"]["accept"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    assert not any(module._forward_hooks for module in mixture.modules())


def test_what_looks_at_zeros_alone_is_refused(mixture: nn.Module, wrong: Plan) -> None:
    with pytest.raises(UsageError, match=r"refine: .*gate is left out or chooses otherwise"):
        refine(wrong, mixture, texts(16, 1), accept=texts(16, 2), task="causal_lm", rounds=1)
