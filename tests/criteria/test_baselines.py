"""Each criterion against straightforward float64 code on a small net."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import PrunekitError, Trajectory, score
from prunekit.criteria import Evidence, score_evidence
from prunekit.data import Samples
from tests.conftest import TinyNet, record, tiny_data

Run = tuple[nn.Module, Trajectory]
COLUMN = torch.arange(3)[:, None]
MEMBERS = {"conv.weight@0": COLUMN, "conv.bias@0": COLUMN, "head.weight@1": COLUMN}
PRUNABLE = ("conv.weight", "head.weight")


def per_sample(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    found = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        found.append(dict(zip([n for n, _ in model.named_parameters()], gradient, strict=True)))
    return found


def test_lamp(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    found = score(trajectory, model, criterion="lamp")
    for name in PRUNABLE:
        squares = dict(model.named_parameters())[name].detach().square()
        expected = torch.stack([w / squares[squares >= w].sum() for w in squares.flatten()]).view(squares.shape)
        torch.testing.assert_close(found.importance[name], expected)
        assert found.importance[name].max() == 1
    sizes = model.conv.weight.detach().square().flatten(1).sum(1) + model.head.weight.detach().square().sum(0)
    expected = torch.stack([s / sizes[sizes >= s].sum() for s in sizes])
    torch.testing.assert_close(found.group(MEMBERS), expected)


def test_lamp_of_a_pruned_state_and_of_nothing(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    at = torch.zeros_like(trajectory.state(-1))
    at[-3] = 1.0
    found = score_evidence(Evidence(trajectory, model, PRUNABLE, at=at), "lamp")
    assert float(sum(t.sum() for t in found.importance.values())) == 0  # the one weight left is a bias
    assert found.group(MEMBERS).tolist() == [0, 0, 0]


def test_magnitude_groups_by_l1(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    found = score(trajectory, model, criterion="magnitude(group=l1)")
    expected = model.conv.weight.detach().abs().flatten(1).sum(1) + model.head.weight.detach().abs().sum(0)
    torch.testing.assert_close(found.group(MEMBERS), expected)


def test_taylor_of_single_samples(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(5, torch.float64)
    changes = torch.stack([g["conv.weight"] * model.conv.weight.detach() for g in per_sample(model, x, y)])
    expected = {
        "taylor": changes.mean(0).abs(),
        "taylor(aggregation=l1)": changes.abs().sum(0),
        "taylor(aggregation=l2)": changes.square().sum(0).sqrt(),
        "taylor(aggregation=square)": changes.square().mean(0),
    }
    for name, importance in expected.items():
        torch.testing.assert_close(score(trajectory, model, [(x, y)], name).importance["conv.weight"], importance)
    found = score(trajectory, model, [(x, y)], "taylor(target=margin,aggregation=l1)")
    total = torch.zeros_like(model.conv.weight)
    for n in range(5):
        out = model(x[n : n + 1])[0]
        others = torch.cat([out[: y[n]], out[y[n] + 1 :]])
        total += (torch.autograd.grad(out[y[n]] - others.max(), model.conv.weight)[0] * model.conv.weight).detach().abs()
    torch.testing.assert_close(found.importance["conv.weight"], total)
    assert found.provenance["target"] == "margin"


@pytest.mark.slow
def test_losses_of_the_users_own(tiny_run: Run) -> None:
    """``target=loss`` is the evidence's loss, whatever that is."""
    model, trajectory = tiny_run
    x, y = tiny_data(4, torch.float64)

    def loss(out: Tensor, labels: Tensor) -> Tensor:
        return (out[torch.arange(len(out)), labels] - 1).square().mean()

    gradient = torch.autograd.grad(loss(model(x), y), model.head.weight)[0]
    for name in ("taylor", "taylor(target=loss)"):
        found = score(trajectory, model, [(x, y)], name, loss=loss)
        torch.testing.assert_close(found.importance["head.weight"], (gradient * model.head.weight).detach().abs())
    lca = score(trajectory, model, [(x, y)], "lca(nodes=16)", loss=loss)
    twin = TinyNet().double()
    twin.load_state_dict(trajectory.model_state(0))
    total = sum(v.sum(2).mean() for k, v in lca.axis_sums.items() if k.endswith("@0"))
    torch.testing.assert_close(total, (loss(model(x), y) - loss(twin(x), y)).detach(), atol=1e-3, rtol=1e-3)
    assert "loss" in lca.provenance


def test_snip(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(300, torch.float64)  # more than a batch
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), [model.conv.weight, model.head.weight])
    found = score(trajectory, model, [(x, y)], "snip")
    parts = [(g * w).detach().abs() for g, w in zip(gradients, (model.conv.weight, model.head.weight), strict=True)]
    for name, part in zip(PRUNABLE, parts, strict=True):
        torch.testing.assert_close(found.importance[name], part)
    torch.testing.assert_close(found.group(MEMBERS), parts[0].flatten(1).sum(1) + parts[1].sum(0))


def test_grasp(tiny_run: Run) -> None:
    """``θ ⊙ H g`` with the whole Hessian, in the paper's order; a group's is the plain sum, up to one constant."""
    model, trajectory = tiny_run
    x, y = tiny_data(300, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([s.numel() for s in shapes])
        state = {n: t.view(s) for n, t, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    signed = dict(zip(names, (flat * (hessian @ gradient)).split([s.numel() for s in shapes]), strict=True))
    found = score(trajectory, model, [(x, y)], "grasp")
    lowest = min(signed[name].min() for name in PRUNABLE)
    for name in PRUNABLE:
        torch.testing.assert_close(found.importance[name].flatten(), signed[name] - lowest, atol=1e-12, rtol=1e-7)
    plain = signed["conv.weight"].view(3, -1).sum(1) + signed["conv.bias"] + signed["head.weight"].view(4, 3).sum(0)
    shifted = found.group(MEMBERS)
    torch.testing.assert_close(shifted - shifted[0], plain - plain[0], atol=1e-12, rtol=1e-7)
    assert (shifted >= 0).all()
    assert "uncovered" not in found.findings


def test_synflow_by_hand_and_conserved(tmp_path: Path) -> None:
    """Without biases the flow through every layer is R (Tanaka et al. 2020, theorem 1 summed over a cut)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6, bias=False), nn.ReLU(),
        nn.Linear(6, 4, bias=False),
    ).double()  # fmt: skip
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = score(trajectory, model, [tiny_data(3, torch.float64)], "synflow")
    ones = F.conv2d(torch.ones(1, 1, 4, 4, dtype=torch.float64), model[0].weight.abs(), padding=1).flatten()
    total = (model[5].weight.abs() @ model[3].weight.abs() @ ones).sum()
    for tensor in found.importance.values():
        torch.testing.assert_close(tensor.sum(), total.detach())
    hidden = model[3].weight.abs() @ ones
    torch.testing.assert_close(found.importance["5.weight"], (model[5].weight.abs() * hidden).detach())
    again = score(trajectory, model, [tiny_data(3, torch.float64, seed=99)], "synflow")
    assert all(torch.equal(again.importance[n], t) for n, t in found.importance.items())  # no data is looked at


def test_synflow_sees_norms_as_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
        nn.LayerNorm(16), nn.Linear(16, 4),
    ).double()  # fmt: skip
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = score(trajectory, model, [tiny_data(3, torch.float64)], "synflow")
    p = {name: tensor.detach().abs() for name, tensor in model.named_parameters()}
    h = F.conv2d(torch.ones(1, 1, 4, 4, dtype=torch.float64), p["0.weight"], p["0.bias"])
    h = h * (p["1.weight"] / (1 + 1e-5) ** 0.5)[:, None, None] + p["1.bias"][:, None, None]
    h = F.conv2d(h, p["3.weight"], p["3.bias"]) * p["4.weight"][:, None, None] + p["4.bias"][:, None, None]
    h = h.flatten(1) * p["7.weight"] + p["7.bias"]
    torch.testing.assert_close(found.importance["8.weight"], p["8.weight"] * h)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_synflow_needs_real_inputs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 4))
    tokens = torch.randint(0, 9, (24, 2))
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), 2, (tokens, torch.arange(24) % 4))
    with pytest.raises(PrunekitError, match=r"takes .*int64 inputs"):
        score(trajectory, model, [(tokens, torch.arange(24) % 4)], "synflow")
    with pytest.raises(PrunekitError, match=r"cannot score 0\.weight \(Embedding\)"):
        score(trajectory, model, [(tokens, torch.arange(24) % 4)], "wanda")
    found = score(trajectory, model, [(tokens, torch.arange(24) % 4)], "wanda", ignore=["0.*"])
    assert set(found.importance) == {"2.weight"}


def test_fisher(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(70, torch.float64)
    gradients = per_sample(model, x, y)
    found = score(trajectory, model, [(x, y)], "fisher")
    for name in PRUNABLE:
        weight = dict(model.named_parameters())[name].detach()
        expected = weight.square() * torch.stack([g[name] for g in gradients]).square().mean(0) / 2
        torch.testing.assert_close(found.importance[name], expected)
    sums = torch.stack(
        [
            (g["conv.weight"] * model.conv.weight).flatten(1).sum(1) + g["conv.bias"] * model.conv.bias
            + (g["head.weight"] * model.head.weight).sum(0)
            for g in gradients
        ]
    )  # fmt: skip
    torch.testing.assert_close(found.group(MEMBERS), (sums.square().mean(0) / 2).detach())


def test_movement_is_the_papers_sum_for_plain_sgd(tmp_path: Path) -> None:
    """``-Σ_s a ∂L/∂w w`` with the gradients of the very batches, weight decay left out."""
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.3)
    twin = TinyNet().double()
    twin.load_state_dict(model.state_dict())
    x, y = tiny_data(24, torch.float64)
    trajectory = record(tmp_path / "t", model, optimizer, data=(x, y))
    total = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(12):
        indices = torch.arange(step * 8, step * 8 + 8) % 24
        gradients = torch.autograd.grad(F.cross_entropy(twin(x[indices]), y[indices]), list(twin.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), gradients, strict=True):
                total[name] -= 0.2 * g * p
                p -= 0.2 * (g + 0.3 * p)
    found = score(trajectory, model, criterion="movement")
    lowest = min(total[name].min() for name in PRUNABLE)
    for name in PRUNABLE:
        torch.testing.assert_close(found.importance[name], (total[name] - lowest).detach(), atol=1e-12, rtol=1e-7)
    plain = (total["conv.weight"].flatten(1).sum(1) + total["conv.bias"] + total["head.weight"].sum(0)).detach()
    shifted = found.group(MEMBERS)
    torch.testing.assert_close(shifted - shifted[0], plain - plain[0], atol=1e-12, rtol=1e-7)


LAYERS = {
    "linear": (nn.Linear(6, 5), torch.randn(9, 4, 6)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)), torch.randn(5, 4, 7, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), torch.randn(5, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), torch.randn(9, 4, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(5, 2, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=2), torch.randn(9, 3, 8)),
}


class Behind(nn.Module):
    """A layer under test behind a fixed input and in front of what makes four classes of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)[:, :4]


@pytest.mark.parametrize("kind", list(LAYERS))
def test_wanda_and_obs_of_every_kind_of_layer(tmp_path: Path, kind: str) -> None:
    """By hand: set one weight to 0 and look at the layer's own outputs; with the rest fixed (Wanda), or solved for (OBS)."""
    layer, x = LAYERS[kind]
    model, x = Behind(layer).double(), x.double()
    y = torch.arange(len(x)) % 4
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.1), 1, (x, y))
    wanda = score(trajectory, model, [(x, y)], "wanda").importance["layer.weight"]
    obs = score(trajectory, model, [(x, y)], "obs(damping=0.000001)").importance["layer.weight"]
    weight = layer.weight.detach()

    def outputs(changed: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": changed}, (x,)).detach().flatten()

    dense = outputs(weight)
    basis = torch.stack([outputs(weight + unit.view(weight.shape)) - dense for unit in torch.eye(weight.numel()).double()], 1)
    for index in (0, weight.numel() // 2, weight.numel() - 1):
        value = weight.flatten()[index]
        torch.testing.assert_close(wanda.flatten()[index] ** 2, (basis[:, index] * value).square().sum())
        others = [i for i in range(weight.numel()) if i != index]
        gone = -value * basis[:, index]
        best = torch.linalg.lstsq(basis[:, others], -gone[:, None], driver="gelsd").solution
        least = (gone + (basis[:, others] @ best)[:, 0]).square().sum()
        torch.testing.assert_close(obs.flatten()[index], least, rtol=1e-3, atol=1e-4 * float(gone.square().sum()))


def test_dead_layers_cost_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 4)).double()
    with torch.no_grad():
        model[1].bias.fill_(-100.0)
    x, y = tiny_data(24, torch.float64)
    trajectory = record(tmp_path / "t", model, torch.optim.SGD(model.parameters(), lr=0.01), 2, (x, y))
    for name in ("obs", "wanda"):
        found = score(trajectory, model, [(x, y)], name)
        assert not found.importance["3.weight"].any()
        assert found.importance["1.weight"].all()
        assert found.findings["uncovered"] == {"3.weight": 12}


@pytest.mark.parametrize("name", ["lamp", "snip", "grasp", "synflow", "fisher", "obs", "wanda", "taylor(aggregation=l2)"])
def test_criteria_of_present_weights_look_at_the_state_given(tiny_run: Run, name: str) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(6, torch.float64)
    earlier = trajectory.state(4)
    evidence = Evidence(trajectory, model, PRUNABLE, Samples.held([(x, y)]))
    last, at = score_evidence(evidence, name), score_evidence(replace(evidence, at=earlier), name)
    assert at.provenance["model"] != last.provenance["model"]
    for key in PRUNABLE:
        assert not torch.allclose(at.importance[key], last.importance[key], rtol=1e-3, atol=0)
