"""Scores by layers' inputs: every kind of layer against its own outputs, in pieces, and what has no inputs said or skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import PrunekitError, Scores, make_plan, score
from prunekit.apply import layerwise
from prunekit.criteria import layer_inputs
from prunekit.criteria.by_inputs import portions
from tests.conftest import record

T = torch.randn


class Conv1D(nn.Module):
    """A linear layer that holds ``(inputs, outputs)``, as transformers has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(T(inputs, outputs)), nn.Parameter(T(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


KINDS: dict[str, tuple[nn.Module, Tensor]] = {
    "by columns": (Conv1D(5, 6), T(9, 4, 6)),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1, groups=2), T(5, 2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), T(7, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 0)), T(5, 3, 3, 4)),
    "transposed and dilated": (nn.ConvTranspose2d(2, 3, 2, dilation=(2, 3)), T(5, 2, 3, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, stride=2), T(5, 2, 2, 2, 2)),
    "reflected": (nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"), T(9, 3, 8)),
    "strided and dilated": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2), T(5, 4, 7, 8)),
}


class Behind(nn.Module):
    """A layer behind a fixed input, called by keyword where that is asked, in front of what makes four classes of it."""

    def __init__(self, layer: nn.Module, keyword: str | None = None) -> None:
        super().__init__()
        self.layer, self.keyword = layer, keyword

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) if self.keyword is None else self.layer(**{self.keyword: x})
        return out.flatten(1)[:, :4]


def scored(folder: Path, model: nn.Module, x: Tensor, criterion: str = "wanda", **options: Any) -> Scores:
    y = torch.arange(len(x)) % 4
    trajectory = record(folder / "t", model, torch.optim.SGD(model.parameters(), lr=0.0), 1, (x, y))
    return score(trajectory, model, [(x, y)], criterion, **options)


def outputs(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (x,)).detach().flatten()


def basis_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What each weight alone adds to the layer's outputs, ``(outputs, weights)``."""
    nothing = torch.zeros_like(layer.weight)  # type: ignore[arg-type]
    units = torch.eye(nothing.numel(), dtype=x.dtype).view(-1, *nothing.shape)
    return torch.stack([outputs(layer, x, unit) - outputs(layer, x, nothing) for unit in units], 1)


@pytest.mark.parametrize("piece", [2**23, 1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_wanda_is_the_norm_of_what_a_weight_adds(kind: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "PIECE", piece)
    layer, x = KINDS[kind][0].double(), KINDS[kind][1].double()
    found = scored(tmp_path, Behind(layer), x).importance["layer.weight"]
    expected = basis_of(layer, x).norm(dim=0).view(found.shape) * layer.weight.detach().abs()  # type: ignore[operator]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("piece", [2**23, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_obs_is_what_the_others_cannot_make_up_for(
    kind: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_inputs, "PIECE", piece)
    layer, x = KINDS[kind][0].double(), KINDS[kind][1].double()
    found = scored(tmp_path, Behind(layer), x, "obs(damping=0.000001)").importance["layer.weight"].flatten()
    basis, weight = basis_of(layer, x), layer.weight.detach().flatten()  # type: ignore[operator]
    for index in (0, len(weight) // 2, len(weight) - 1):
        others = [i for i in range(len(weight)) if i != index]
        gone = -weight[index] * basis[:, index]
        best = torch.linalg.lstsq(basis[:, others], -gone[:, None], driver="gelsd").solution
        least = (gone + (basis[:, others] @ best)[:, 0]).square().sum()
        torch.testing.assert_close(found[index], least, rtol=1e-3, atol=1e-4 * float(gone.square().sum()))


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("piece", [2**23, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_compensated_layers_are_least_squares(kind: str, piece: int, inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "PIECE", piece)
    layer, x = KINDS[kind][0].double(), KINDS[kind][1].double()
    torch.manual_seed(0)
    mask = torch.rand(layer.weight.shape) < 0.7  # type: ignore[arg-type]
    model = Behind(layer)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is layer.weight)
    batches = [(x[:3], torch.zeros(3)), (x[3:], torch.zeros(len(x) - 3))]
    found = layerwise(model, {"layer.weight": mask}, batches, inputs=inputs, damping=0).layer.weight.detach()  # type: ignore[union-attr]
    basis, dense = basis_of(layer, x), layer.weight.detach().flatten()  # type: ignore[operator]
    kept = mask.flatten()
    best = torch.linalg.lstsq(basis[:, kept], (basis @ dense)[:, None], driver="gelsd").solution[:, 0]
    least = (basis[:, kept] @ best - basis @ dense).square().sum()
    assert not found[~mask].any()
    torch.testing.assert_close((basis @ (found.flatten() - dense)).square().sum(), least, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weights_come_back(kind: str) -> None:
    layer = KINDS[kind][0]
    weight = T(layer.weight.shape)  # type: ignore[call-overload]
    assert torch.equal(layer_inputs.from_rows(layer, layer_inputs.to_rows(layer, weight)), weight)


def test_no_piece_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "PIECE", 500)
    for layer, x, row in ((nn.Conv2d(4, 6, 3, padding=1), T(6, 4, 20, 20), 36), (nn.Linear(6, 5), T(9, 70, 6), 6)):
        pieces = list(layer_inputs.rows(layer, x))
        assert all(piece.numel() <= 500 for piece in pieces)
        assert sum(piece.shape[1] for piece in pieces) == x.numel() // x.shape[1 if row == 36 else 2]
        assert all(piece.dtype == torch.float64 and piece.shape[2] == row for piece in pieces)


def test_sums_that_do_not_fit_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x = T(9, 6).double()
    whole = scored(tmp_path / "a", model, x, "obs")
    layers = layer_inputs.layers_with_inputs(model, ["0.weight", "2.weight", "4.weight"])[0]
    monkeypatch.setattr("prunekit.criteria.by_inputs.HELD", 8 * 50)
    assert [list(some) for some in portions(layers, 2)] == [["0.weight"], ["2.weight", "4.weight"]]
    parted = scored(tmp_path / "b", model, x, "obs")
    assert all(torch.equal(parted.importance[name], values) for name, values in whole.importance.items())


@pytest.mark.parametrize("keyword", [None, "input"])
def test_inputs_by_keyword_and_of_short_types(keyword: str | None, tmp_path: Path) -> None:
    layer, x = nn.Linear(6, 4), T(9, 6)
    expected = layer.weight.detach().abs() * x.norm(dim=0)
    torch.testing.assert_close(scored(tmp_path, Behind(layer, keyword), x).importance["layer.weight"], expected)
    with layer_inputs.summing({"layer.weight": [layer.bfloat16()]}, layer_inputs.of_squares) as sums:
        layer(x.bfloat16())
        layer(x.bfloat16()[0])  # without a batch axis
    rounded = x.bfloat16().double()
    torch.testing.assert_close(sums["layer.weight"][0], rounded.square().sum(0) + rounded[0].square())


def test_inputs_without_a_batch_axis_are_one_sample() -> None:
    for layer, x in KINDS.values():
        if "Conv" in type(layer).__name__ and x.dim() > 2 and type(layer).__name__ != "Conv1D":
            whole, one = (torch.cat(list(layer_inputs.rows(layer, part)), 1) for part in (x[:1], x[0]))
            assert torch.equal(whole, one)


def test_layers_inside_torchs_own_encoder_are_reached(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(1))

    found = scored(tmp_path, Net(), T(9, 5, 8), ignore=["encoder.self_attn.*"])
    assert found.importance["encoder.linear1.weight"].all()


class Mixed(nn.Module):
    """Two layers that fit, and three weights that do not: a table, recurrent ones, and one whose layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(9, 6), nn.GRU(6, 5, batch_first=True)
        self.first, self.aside, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.embed(x))[0][:, -1]
        return self.head(torch.relu(self.first(h)) + nn.functional.linear(h, self.aside.weight))


TOKENS = torch.arange(24).view(8, 3) % 9
UNFIT = {"embed.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "aside.weight"}


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_all_that_does_not_fit_is_named_at_once(criterion: str, tmp_path: Path) -> None:
    with pytest.raises(PrunekitError) as refusal:
        scored(tmp_path, Mixed(), TOKENS, criterion)
    said = str(refusal.value)
    assert all(f"{name} (" in said for name in UNFIT - {"aside.weight"})
    assert "embed.weight (Embedding), rnn.weight_ih_l0 (GRU)" in said
    assert "--skip-unfit" in said
    assert "head.weight" not in said
    with pytest.raises(PrunekitError, match=r"cannot score aside\.weight \(no input reached its layer\)"):
        scored(tmp_path / "again", Mixed(), TOKENS, criterion, ignore=["embed.*", "rnn.*"])


@pytest.mark.parametrize(("criterion", "power"), [("wanda", 1), ("obs", 2)])
def test_what_does_not_fit_is_scored_by_magnitude_where_that_is_asked(criterion: str, power: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    found = scored(tmp_path, model, TOKENS, criterion, skip_unfit=True)
    said = found.findings["by_magnitude"]
    assert set(said["parameters"]) == UNFIT
    assert found.provenance["skip_unfit"] is True
    weights = {name: p.detach().double().abs() ** power for name, p in model.named_parameters()}
    fit = ["first.weight", "head.weight"]
    right = sum(float(found.importance[n].double().sum()) for n in fit) / sum(float(weights[n].sum()) for n in fit)
    assert said["scale"] == pytest.approx(right, rel=1e-6)
    for name in UNFIT:
        torch.testing.assert_close(found.importance[name].double(), weights[name] * right, rtol=1e-5, atol=1e-12)
    alone = scored(tmp_path / "alone", model, TOKENS, criterion, ignore=["embed.*", "rnn.*", "aside.*"])
    assert all(torch.equal(found.importance[name], alone.importance[name]) for name in fit)
    assert "skip_unfit" not in alone.provenance
    found.save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors").findings["by_magnitude"] == said
    plan = make_plan(found, model, sparsity=0.5)
    prunable = sum(p.numel() for n, p in model.named_parameters() if n in found.importance)
    assert sum(int((~keep).sum()) for keep in plan.keep.values()) == pytest.approx(0.5 * prunable, abs=1)


def test_skipping_changes_nothing_where_all_fit_and_cannot_make_up_for_none(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)), T(9, 6)
    plain, skipping = scored(tmp_path / "a", model, x), scored(tmp_path / "b", model, x, skip_unfit=True)
    assert torch.equal(plain.importance["0.weight"], skipping.importance["0.weight"])
    assert "by_magnitude" not in skipping.findings
    with pytest.raises(PrunekitError, match=r"cannot score embed\.weight \(Embedding\)"):
        scored(tmp_path / "c", Mixed(), TOKENS, skip_unfit=True, ignore=["rnn.*", "first.*", "aside.*", "head.*"])


def test_a_tied_weight_sees_the_inputs_of_all_its_layers(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.second.weight, self.head.weight = self.first.weight, self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            self.one = self.embed(x).mean(1)
            self.two = self.first(self.one)
            self.three = self.second(self.two)
            return self.head(self.three)

    model = Tied()
    found = scored(tmp_path, model, TOKENS)
    with torch.no_grad():
        model(TOKENS)
        both = (model.one.square().sum(0) + model.two.square().sum(0)).sqrt()
        torch.testing.assert_close(found.importance["first.weight"], model.first.weight.abs() * both)
        torch.testing.assert_close(found.importance["embed.weight"], model.embed.weight.abs() * model.three.norm(dim=0))


def test_compositions_say_what_was_scored_by_magnitude(tmp_path: Path) -> None:
    found = scored(tmp_path, Mixed(), TOKENS, "wanda^0.5*magnitude^0.5", skip_unfit=True)
    assert set(found.findings["by_magnitude"]["parameters"]) == UNFIT
