"""Layer-wise compensated weights against plain least squares on the layers' inputs."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import ArtifactError, NonFiniteError, UsageError, make_plan, score
from prunekit.apply import apply_masks, layerwise, masked
from prunekit.batch import call
from prunekit.criteria.layer_inputs import handled
from tests.blocks.models import Residual, blocks, family
from tests.conftest import record, tiny_data


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 9),
        nn.ReLU(), nn.Linear(9, 4),
    ).double()  # fmt: skip


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        found[f"{name}.weight"] = x.detach()
        x = layer(x)
    return found


def random_masks(model: nn.Module, keep: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) < keep for n, p in model.named_parameters() if p.dim() > 1}


def by_hand(layer: nn.Module, mask: Tensor, given: Tensor, wanted: Tensor) -> tuple[Tensor, float, bool]:
    """Least squares over the kept weights, then the bias; its squared error; and whether there is one solution only."""
    shapes = {name: p.shape for name, p in layer.named_parameters()}

    def outputs(flat: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes.values()])
        state = {n: t.view(s) for (n, s), t in zip(shapes.items(), pieces, strict=True)}
        return torch.func.functional_call(layer, state, (given,)).detach().flatten()

    free = torch.cat([mask.flatten(), torch.ones(shapes["bias"].numel(), dtype=torch.bool)])
    basis = torch.stack([outputs(unit) for unit in torch.eye(len(free)).double()[free]], 1)
    best = torch.linalg.lstsq(basis, wanted.flatten()[:, None], driver="gelsd").solution[:, 0]
    error = float((basis @ best - wanted.flatten()).square().sum())
    return best, error, int(torch.linalg.matrix_rank(basis)) == len(best)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("samples", [3, 60])
@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_error_is_the_least_that_the_mask_allows(samples: int, keep: float, inputs: str) -> None:
    model = net()
    x, y = tiny_data(samples, torch.float64)
    masks = random_masks(model, keep)
    found = layerwise(model, masks, [(x[:2], y[:2]), (x[2:], y[2:])], inputs=inputs, damping=0)
    uncompensated = net()
    apply_masks(uncompensated, masks)
    dense = inputs_of(model, x)
    sent = dense if inputs == "dense" else inputs_of(found, x)
    unique = 0
    for name, given in dense.items():
        if name not in masks:
            continue
        number = int(name.split(".")[0])
        wanted = model[number](given).detach()
        solved, plain = found[number], uncompensated[number]
        assert not solved.weight[~masks[name]].any()
        best, least, one = by_hand(model[number], masks[name], sent[name], wanted)
        with torch.no_grad():
            reached = float((solved(sent[name]) - wanted).square().sum())
            assert reached <= float((plain(sent[name]) - wanted).square().sum()) * (1 + 1e-9) + 1e-12
        assert reached == pytest.approx(least, rel=1e-6, abs=1e-9)
        if one:
            unique += 1
            kept = torch.cat([solved.weight[masks[name]], solved.bias]).detach()
            torch.testing.assert_close(kept, best, atol=1e-7, rtol=1e-6)
    assert unique >= (2 if samples == 60 else 0)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_nothing_removed_changes_nothing(inputs: str) -> None:
    model = net()
    everything = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    found = layerwise(model, everything, [tiny_data(5, torch.float64)], inputs=inputs)
    for before, after in zip(model.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_channel_plan_is_compensated_with_its_zeros_in_place(tmp_path: Path, inputs: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = tiny_data(40, torch.float64)
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), data=(x, y))
    plan = make_plan(score(trajectory, model, criterion="magnitude"), model, x[:1], sparsity=0.5, structure="channels")
    before = [p.clone() for p in model.parameters()]
    model.train()
    found, plain = layerwise(model, plan.masks(), [(x, y)], inputs=inputs), masked(model, plan)
    assert found.training
    for name, mask in plan.masks().items():
        assert not dict(found.named_parameters())[name][~mask.bool()].any()
    assert (found(x) - model(x)).square().sum() < (plain(x) - model(x)).square().sum()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_an_output_without_weights_becomes_its_mean() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    x, y = tiny_data(40, torch.float64)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1] = False
    found = layerwise(model, {"1.weight": mask}, [(x, y)], damping=0)
    expected = model(x).detach()
    expected[:, 1] = expected[:, 1].mean()
    torch.testing.assert_close(found(x).detach(), expected)


def test_layers_called_twice_and_without_bias() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x.flatten(1))))))

    torch.manual_seed(0)
    model = Twice().double()
    x, y = tiny_data(60, torch.float64)
    mask = torch.rand(16, 16) < 0.5
    found = layerwise(model, {"inner.weight": mask}, [(x, y)], inputs="dense", damping=0)
    once = x.flatten(1)
    given = torch.cat([once, torch.tanh(model.inner(once))]).detach()
    for row in range(16):
        best = torch.linalg.lstsq(given[:, mask[row]], given @ model.inner.weight[row].detach()[:, None]).solution[:, 0]
        torch.testing.assert_close(found.inner.weight[row][mask[row]].detach(), best)
    assert torch.equal(found.out.weight, model.out.weight)
    assert layerwise(model, {"inner.weight": mask}, [(x, y)], inputs="pruned").inner.bias is None


def test_damping_holds_weights_back() -> None:
    model = net()
    x, y = tiny_data(60, torch.float64)
    masks = random_masks(model, 0.5)
    dense = dict(model.named_parameters())["5.weight"].detach()[masks["5.weight"]]
    moves = []
    for damping in (0.0, 0.1, 1.0):
        found = dict(layerwise(model, masks, [(x, y)], inputs="dense", damping=damping).named_parameters())["5.weight"].detach()
        moves.append(float((found[masks["5.weight"]] - dense).norm()))
    assert moves[0] > moves[1] > moves[2] > 0
    with pytest.raises(UsageError, match="damping is -1"):
        layerwise(model, masks, [(x, y)], damping=-1.0)
    with pytest.raises(UsageError, match="did you mean pruned"):
        layerwise(model, masks, [(x, y)], inputs="prune")
    with pytest.raises(ArtifactError, match="mask nowhere"):
        layerwise(model, {"nowhere": torch.ones(2)}, [(x, y)])


def test_frozen_biases_stay_and_the_weights_make_up_for_what_is_left() -> None:
    model, (x, y) = net(), tiny_data(60, torch.float64)
    for name in ("0.bias", "5.bias"):
        model.get_parameter(name).requires_grad_(False)
    masks = random_masks(model, 0.4)
    found = layerwise(model, masks, [(x, y)], damping=0)
    for name in ("0.bias", "5.bias"):
        assert torch.equal(found.get_parameter(name), model.get_parameter(name))
    given, first, mask = x.detach(), model.get_submodule("0"), masks["0.weight"]
    columns = nn.functional.unfold(given, 3, padding=1).transpose(1, 2).flatten(0, 1)
    for row, kept, solved in zip(*(t.flatten(1) for t in (first.weight, mask, found.get_parameter("0.weight"))), strict=True):
        best = torch.linalg.lstsq(columns[:, kept], columns @ row[:, None], driver="gelsd").solution[:, 0]
        assert torch.allclose(solved[kept], best)
        assert bool((solved[~kept] == 0).all())


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_inputs_that_are_no_numbers_are_refused(inputs: str) -> None:
    model, (x, y) = net(), tiny_data(8, torch.float64)
    x = x.clone()
    x[3, 0, 1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        layerwise(model, random_masks(model, 0.5), [(x, y)], inputs=inputs)


WRITERS = {
    "self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "", "attn.c_proj": "ln_2", "mlp.c_proj": "",
    "attention.output.dense": "attention.output.LayerNorm", "output.dense": "output.LayerNorm",
}  # fmt: skip
"""Layers of a block that write into its stream, and what gets the sum: a layer of the block, or whoever is after it."""


def reads_sum(model: nn.Module, name: str) -> tuple[nn.Module, bool] | None:
    """The module that gets, or gives (True), the sum that a layer writes into."""
    for number in ("0", "1"):
        block, _, inside = name.removesuffix(".weight").partition(f".{number}.")
        if inside in WRITERS:
            after = WRITERS[inside]
            return model.get_submodule(".".join([block, number, *after.split(".")]) if after else f"{block}.{number}"), not after
    return None


def one_by_one(model: nn.Module, masks: dict[str, Tensor], batches: list[Any], damping: float) -> dict[str, Tensor]:
    """Every layer's kept weights by plain least squares on what two passes through the whole of both models send, in order."""
    pruned, order = masked_copy(model, masks), list[str]()
    layers, theirs = ({f"{path}.weight": m for path, m in each.named_modules()} for each in (model, pruned))
    hooks = [layers[name].register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name in masks]
    call(model, batches[0][0])
    for hook in hooks:
        hook.remove()
    for name in dict.fromkeys(order):
        sent, added = list[Tensor](), list[Tensor]()
        for each, held in ((model, layers), (pruned, theirs)):
            seen: list[Tensor] = []
            rest: list[Tensor] = []  # the sum less the layer's own outputs

            def see(given: Any, into: list[Tensor] = seen, factor: float = 1.0) -> None:
                given = given[0] if isinstance(given, tuple) else given
                into.append(factor * given.detach().flatten(0, -2))

            hooks = [held[name].register_forward_pre_hook(lambda _, given, see=see: see(given))]
            if (reader := reads_sum(each, name)) is not None:
                own = partial(see, into=rest)
                hooks.append(held[name].register_forward_hook(lambda _, given, out, own=own: own(out, factor=-1.0)))
                if reader[1]:
                    hooks.append(reader[0].register_forward_hook(lambda _, given, out, own=own: own(out)))
                else:
                    hooks.append(reader[0].register_forward_pre_hook(lambda _, given, own=own: own(given)))
            for x, _ in batches:
                call(each, x)
            for hook in hooks:
                hook.remove()
            sent.append(torch.cat(seen))
            if rest:
                added.append(torch.cat([one + other for one, other in zip(rest[::2], rest[1::2], strict=True)]))
        short = added[0] - added[1] if added else torch.zeros(1, len(masks[name]) * max(masks[name].shape))
        x, turned = (torch.cat([rows, torch.ones(len(rows), 1).double()], 1) for rows in sent)
        layer, other, mask = layers[name], theirs[name], masks[name]
        by_columns = not isinstance(layer, nn.Linear)  # GPT-2's, whose weights are (inputs, outputs)
        weight = (layer.weight.T if by_columns else layer.weight).detach()
        keep = mask.T if by_columns else mask
        joint = torch.cat([weight, torch.zeros(len(weight), 1) if layer.bias is None else layer.bias.detach()[:, None]], 1)
        stays = torch.cat([keep, torch.full((len(keep), 1), layer.bias is not None)], 1)
        level = (damping * turned.square().sum(0)[:-1].mean()).sqrt()
        found = torch.zeros_like(joint)
        for row, (old, own) in enumerate(zip(joint, stays, strict=True)):
            matrix = torch.cat([turned[:, own], level * torch.eye(int(own.sum())).double()])
            wanted = torch.cat([x @ old + short[:, row], level * old[own]])
            found[row, own] = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
        with torch.no_grad():
            other.weight.copy_(found[:, :-1].T if by_columns else found[:, :-1])
            if layer.bias is not None:
                other.bias.copy_(found[:, -1])
    return dict(pruned.named_parameters())


def masked_copy(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    found = copy.deepcopy(model)
    apply_masks(found, masks)
    return found


def some_masks(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    own = dict(model.named_parameters())
    layers = [f"{path}.weight" for path, module in model.named_modules() if handled(module) and path.startswith(prefix)]
    return {name: torch.rand(own[name].shape, generator=generator) < 0.6 for name in layers if name in own}


@pytest.mark.parametrize("name", ["blocks", "llama", "gpt2", "bert"])
def test_block_by_block_is_what_passes_through_all_of_both_models_give(name: str) -> None:
    model, batches = blocks() if name == "blocks" else family(name)
    masks = some_masks(model.eval())
    found = dict(layerwise(model, masks, batches, damping=0.01).named_parameters())
    for parameter, value in one_by_one(model, masks, batches, 0.01).items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-6, atol=1e-8)


def test_a_block_runs_no_more_often_the_more_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = list[nn.Module](), Residual.forward
    monkeypatch.setattr(
        Residual, "forward", lambda self, *given, **named: (calls.append(self), forward(self, *given, **named))[1]
    )
    counts = []
    for depth in (2, 8):
        model, batches = blocks(blocks=depth)
        calls.clear()
        layerwise(model, some_masks(model, "blocks."), batches)
        counts.append(len(calls))
    assert counts[1] <= 4 * counts[0]


def test_rows_that_a_router_sends_elsewhere_belong_to_none() -> None:
    """Masks change which rows an expert gets: its outputs on the pruned model's own rows are kept then."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            to, found = self.router(x).argmax(1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                found[to == number] = expert(x[to == number])
            return found

    torch.manual_seed(1)
    model, x = Routed().double(), torch.randn(40, 6, dtype=torch.float64)
    masks = some_masks(model)
    found = layerwise(model, masks, [(x, None)], damping=0)
    to = found.router(x).argmax(1)
    assert not torch.equal(to, model.router(x).argmax(1))
    for number, expert in enumerate(found.experts):
        given, mask = x[to == number], masks[f"experts.{number}.weight"]
        wanted = model.experts[number](given).detach()
        for row in range(6):
            basis = torch.cat([given[:, mask[row]], torch.ones(len(given), 1).double()], 1)
            best = torch.linalg.lstsq(basis, wanted[:, row : row + 1]).solution[:, 0]
            torch.testing.assert_close(torch.cat([expert.weight[row, mask[row]], expert.bias[row, None]]).detach(), best)


def test_an_embedding_that_the_output_layer_shares_is_masked_only() -> None:
    model, batches = family("llama")  # its output layer is its embedding
    shared, other = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
    masks = {
        shared: torch.rand(model.get_parameter(shared).shape) < 0.7,
        other: torch.rand(model.get_parameter(other).shape) < 0.7,
    }
    found, plain = layerwise(model, masks, batches), masked_copy(model, masks)
    assert torch.equal(found.get_parameter(shared), plain.get_parameter(shared))
    assert not torch.equal(found.get_parameter(other), plain.get_parameter(other))


class Padding(nn.Conv2d):
    """It pads in its own forward, which its settings do not say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Tripling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 3 * self.weight, self.bias)


class Pairing(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        found = self.layer(h)
        return h + (found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(Padding(2, 2, 3), (8, 2, 4, 6)), (Tripling(6, 6), (20, 6)), (Pairing(6, 6), (20, 6))]
)
def test_a_layer_whose_weight_does_not_say_what_it_gives_is_masked_only(layer: Any, shape: tuple[int, ...], inputs: str) -> None:
    torch.manual_seed(0)
    model, x = Around(copy.deepcopy(layer)).double(), torch.randn(shape).double()
    masks = {"first.weight": torch.rand(6, 6) < 0.6, "layer.weight": torch.rand(layer.weight.shape) < 0.6}
    found: Any = layerwise(model, masks, [(x, None)], inputs=inputs)
    plain: Any = masked_copy(model, masks)
    assert torch.equal(found.layer.weight, plain.layer.weight)
    assert not torch.equal(found.first.weight, plain.first.weight)


def test_a_bias_that_layers_share_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    model[2].bias = model[0].bias
    masks, x = random_masks(model, 0.6), torch.randn(50, 6).double()
    found: Any = layerwise(model, masks, [(x, None)])
    assert torch.equal(found[0].bias, model[0].bias)
    assert found[2].bias is found[0].bias
    assert not torch.equal(found[4].bias, model[4].bias)


def test_a_shared_weight_is_solved_for_with_the_biases_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    x, mask = torch.randn(80, 6).double(), torch.rand(6, 6) < 0.6
    found: Any = layerwise(model, {"0.weight": mask}, [(x, None)], damping=0, inputs="dense")
    assert all(torch.equal(found[n].bias, model[n].bias) for n in (0, 2))
    both = torch.cat([x, torch.tanh(model[0](x))]).detach()
    for row, keep in enumerate(mask):
        best = torch.linalg.lstsq(both[:, keep], (both @ model[0].weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[0].weight[row, keep], best.detach())


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_a_layer_without_weights_gives_what_it_gave_on_average(inputs: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, masks = torch.randn(50, 6).double(), {"0.weight": torch.zeros(5, 6).bool(), "2.weight": torch.ones(3, 5).bool()}
    found: Any = layerwise(model, masks, [(x, None)], inputs=inputs, damping=0)
    torch.testing.assert_close(found[0].bias, model[0](x).mean(0))
    if inputs == "pruned":
        torch.testing.assert_close(found(x).mean(0), model(x).mean(0))


def test_what_is_frozen_stays_where_something_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, masks = torch.randn(50, 6).double(), random_masks(model, 0.6)
    model[0].weight.requires_grad_(False)
    plain: Any = masked_copy(model, masks)
    found: Any = layerwise(model, masks, [(x, None)])
    assert torch.equal(found[0].weight, plain[0].weight)
    assert not torch.equal(found[2].weight, plain[2].weight)
    model.requires_grad_(False)
    found = layerwise(model, masks, [(x, None)])
    assert not torch.equal(found[0].weight, plain[0].weight)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_an_expert_that_no_row_is_sent_to_is_called_with_none(inputs: str) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.experts = nn.Linear(5, 5), nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h, chosen = self.first(x), (x[:, 0] > 0).long()  # the last expert is never asked
            out = torch.zeros_like(h)
            for number, expert in enumerate(self.experts):
                sent = torch.where(chosen == number)[0]
                out = out.index_add(0, sent, expert(h[sent]))
            return h + out

    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(40, 5).double()
    masks = random_masks(model, 0.6)
    found: Any = layerwise(model, masks, [(x, None)], inputs=inputs)
    plain: Any = masked_copy(model, masks)
    assert not torch.equal(found.experts[0].weight, plain.experts[0].weight)
    torch.testing.assert_close(found.experts[2].weight, plain.experts[2].weight)
