"""Criteria of units against straightforward float64 code on tiny language models, and what they are refused for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import ArtifactError, PrunekitError, Scores, StructureError, UsageError, make_plan, score
from prunekit.criteria.units import empty_sums
from prunekit.plan.allocation import Request, standardised
from prunekit.search import compare
from prunekit.structure import Group, find_groups
from tests.conftest import TinyNet, imported, tiny_data
from tests.criteria.material import mixture, text
from tests.transformer_models import built

IGNORED = {"llama": ["*embed*"], "gpt2": ["*wte*"], "mixtral": ["*embed*", "lm_head*"]}


def scored(family: str, criterion: str, **options: Any) -> tuple[nn.Module, Scores, dict[str, Tensor]]:
    model, _ = built(family)
    inputs, labels = text(5)
    halves = [({"input_ids": labels[:3]}, labels[:3]), ({"input_ids": labels[3:]}, labels[3:])]
    found = score(imported(model), model, halves, criterion, task="causal_lm", ignore=IGNORED[family], **options)
    return model if family == "mixtral" else model.double(), found, inputs  # grouped experts take no float64


def inputs_of(model: nn.Module, layer: str, inputs: dict[str, Tensor]) -> Tensor:
    """Rows ``(tokens, d)`` that go into a layer of the float64 model."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0].flatten(0, -2)


READERS = {
    ("llama", "neurons"): "model.layers.1.mlp.down_proj", ("llama", "heads"): "model.layers.1.self_attn.o_proj",
    ("gpt2", "neurons"): "transformer.h.1.mlp.c_proj", ("gpt2", "heads"): "transformer.h.1.attn.c_proj",
}  # fmt: skip


@pytest.mark.slow  # it imports transformers
@pytest.mark.parametrize(("family", "structure"), READERS)
def test_flap_is_variance_times_squared_norm_of_what_reads_a_unit(family: str, structure: str) -> None:
    model, found, inputs = scored(family, "flap")
    reader = READERS[family, structure]
    group = _of(find_groups(structure, model, inputs), reader.rpartition(".")[0])
    rows, weight = inputs_of(model, reader, inputs), model.get_parameter(f"{reader}.weight").detach()
    norms = weight.square().sum(int(family == "gpt2")) if family == "gpt2" else weight.square().sum(0)
    channels = rows.var(0) * norms
    torch.testing.assert_close(found.group(group.members), channels.view(group.size, -1).sum(1), rtol=1e-4, atol=0)
    by_rows = (rows.var(0)[:, None] if family == "gpt2" else rows.var(0)[None]) * weight.square()
    torch.testing.assert_close(found.importance[f"{reader}.weight"].double(), by_rows, rtol=1e-4, atol=0)


def test_flap_of_convolutions_reads_patches() -> None:
    """A channel that a convolution reads: the variance of each place of its patches, times that place's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = tiny_data(6, torch.float64)
    found = score(imported(model), model, [(x, y)], "flap")
    patches = F.unfold(model[1](model[0](x)), 3).transpose(1, 2).flatten(0, 1)
    expected = (patches.var(0) * model[2].weight.flatten(1).square().sum(0)).view(4, 9).sum(1).detach()
    torch.testing.assert_close(
        found.group({"0.weight@0": torch.arange(4)[:, None], "2.weight@1": torch.arange(4)[:, None]}), expected
    )


def test_standardised_layers_have_mean_0_and_deviation_1_and_what_is_nothing_goes_first() -> None:
    values = {"a": torch.rand(50) + 1, "b": torch.cat([1e3 * torch.rand(9) + 1, torch.zeros(2)]), "c": torch.ones(1)}
    found = standardised(values, Request(0.5))
    for name, some in (("a", found["a"]), ("b", found["b"][:9])):
        assert float(some.mean()) == pytest.approx(0, abs=1e-9)
        assert float(some.std(correction=0)) == pytest.approx(1)
        assert torch.equal(some.argsort(), values[name][: len(some)].argsort())
    assert found["b"][9:].tolist() == [-torch.inf] * 2
    assert found["c"].tolist() == [0]


@pytest.mark.slow
def test_reap_is_the_mean_of_weight_times_norm_over_routed_tokens() -> None:
    model, found, inputs = scored("mixtral", "reap")
    group = _of(find_groups("experts", model, inputs), "model.layers.1")
    mlp: Any = model.get_submodule(group.name)
    rows = inputs_of(model, f"{group.name}.experts", inputs)
    with torch.no_grad():
        top, chosen = torch.softmax(rows @ mlp.gate.weight.t(), -1).topk(2, -1)
        top = top / top.sum(-1, keepdim=True)
        expected = []
        for e in range(4):
            token, place = torch.where(chosen == e)
            gate, up = (rows[token] @ mlp.experts.gate_up_proj[e].t()).chunk(2, -1)
            out = (F.silu(gate) * up) @ mlp.experts.down_proj[e].t()
            expected.append((top[token, place] * out.norm(dim=-1)).mean())
    torch.testing.assert_close(found.group(group.members).float(), torch.stack(expected), rtol=1e-4, atol=0)
    bank = found.importance[f"{group.name}.experts.down_proj"]
    torch.testing.assert_close(bank, torch.stack(expected).float()[:, None, None].expand(bank.shape), rtol=1e-4, atol=0)
    plan = make_plan(found, model, inputs, sparsity=0.2, structure="experts", allocation="uniform")
    gone = (~plan.keep[group.name]).nonzero().flatten().tolist()
    assert gone in ([], [int(torch.stack(expected).argmin())])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_block_influence_is_one_less_the_mean_cosine(family: str) -> None:
    model, found, inputs = scored(family, "block_influence")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    first = next(g for g in find_groups("layers", model, inputs) if g.name.endswith("0"))
    expected = 1 - F.cosine_similarity(states[0], states[1], dim=-1).mean()
    torch.testing.assert_close(found.group(first.members), expected[None], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_scores_of_one_structure_prune_no_other() -> None:
    model, trajectory = mixture()
    inputs, labels = text(4)
    task: dict[str, Any] = {"task": "causal_lm"}
    how = {**task, "ignore": IGNORED["mixtral"]}
    at: dict[str, Any] = {"structures": ["experts"], "allocations": ["global"], "sparsities": [0.2], **task}
    found = {name: score(trajectory, model, [(inputs, labels)], name, **how) for name in ("reap", "block_influence")}
    whole = score(trajectory, model, [(inputs, labels)], "reap*magnitude", **how)
    for scores in (found["reap"], whole):
        with pytest.raises(UsageError, match="are of experts, and the structure is channels"):
            make_plan(scores, model, inputs, sparsity=0.5, structure="channels")
    with pytest.raises(ArtifactError, match="scores of different structures cannot be composed"):
        score(trajectory, model, [(inputs, labels)], "reap*block_influence", **how)
    cells = compare(model, found, [(inputs, labels)], **at).cells
    assert [cell["criterion"] for cell in cells] == ["reap"]
    with pytest.raises(UsageError, match="none of block_influence scores experts"):
        compare(model, {"block_influence": found["block_influence"]}, [(inputs, labels)], **at)


def test_models_without_such_units_and_experts_called_otherwise_are_refused() -> None:
    net = TinyNet()
    with pytest.raises(StructureError, match="experts"):
        score(imported(net), net, [tiny_data(4)], "reap")
    from prunekit.criteria.reap import _add

    with pytest.raises(PrunekitError, match="it must be called with hidden states"):
        _add(torch.zeros(2, 4), nn.Linear(2, 2), (torch.zeros(3, 2),), {}, "mlp.experts")


def test_empty_sums_hold_every_axis_of_a_unit() -> None:
    assert {k: tuple(v.shape) for k, v in empty_sums({"a": (2, 3, 5), "b": (4, 6, 3, 3)}).items()} == {
        "a@0": (1, 1, 2), "a@1": (1, 1, 3), "a@2": (1, 1, 5), "b@0": (1, 1, 4), "b@1": (1, 1, 6),
    }  # fmt: skip


def _of(groups: Any, path: str) -> Group:
    found: Group = next(group for group in groups if group.name.startswith(path))
    return found


class Writing(nn.Module):
    """A block that adds to its hidden states in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = nn.Linear(4, 4), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        if not self.in_place:
            return x + y
        x += y
        return x


class Blocks(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList(Writing(in_place) for _ in range(3))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last(x)
        return found


def test_block_influence_of_blocks_that_change_what_they_are_given() -> None:
    plain, changing = Blocks(False).double(), Blocks(True).double()
    changing.load_state_dict(plain.state_dict())
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (
        score(imported(model), model, [(x, torch.zeros(20).long())], "block_influence", ignore=["first*", "last*"])
        for model in (plain, changing)
    )
    for group in find_groups("layers", plain, x[:2]):
        assert float(one.group(group.members)) > 0
        torch.testing.assert_close(other.group(group.members), one.group(group.members))
