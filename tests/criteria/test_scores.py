"""Each criterion against independent code, and the score file that holds it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunekit import (
    ArtifactError,
    NonFiniteError,
    PrunekitError,
    Recorder,
    Scores,
    Trajectory,
    UsageError,
    checkpoint,
    make_plan,
    score,
)  # fmt: skip
from prunekit.criteria import CRITERIA, Evidence, OnlineInfluence, additive, score_evidence
from prunekit.data import Samples
from prunekit.kernel import ModelFunction, attribute
from prunekit.trajectory import write_checkpoints
from tests.conftest import TinyNet, record, tiny_data
from tests.criteria.material import material

Run = tuple[nn.Module, Trajectory]


def test_influence_by_hand(tiny_run: Run) -> None:
    """Σ_x Σ_c |Σ_s U_s ∂f_c/∂θ(midpoint)| with one backward pass a number, U from AdamW's own formula."""
    model, trajectory = tiny_run
    x, y = tiny_data(3, torch.float64)
    found = score(trajectory, model, [(x, y)], "influence")
    psi = torch.zeros(3, 4, trajectory.layout.total, dtype=torch.float64)
    twin = TinyNet().double()
    for s in range(len(trajectory)):
        before, after = trajectory.state(s), trajectory.state(s + 1)
        update = after - before + 0.05 * 0.1 * before  # lr 0.05, decay 0.1
        with torch.no_grad():
            for entry, p in zip(trajectory.layout, twin.parameters(), strict=True):
                p.copy_(((before + after) / 2)[entry.span].view_as(p))
        for n in range(3):
            for c in range(4):
                gradient = torch.autograd.grad(twin(x[n : n + 1])[0, c], list(twin.parameters()))
                psi[n, c] += update * torch.cat([g.flatten() for g in gradient])
    for entry in trajectory.layout:
        part = psi[:, :, entry.span].view(3, 4, *entry.shape)
        if entry.name in found.importance:
            torch.testing.assert_close(found.importance[entry.name], part.abs().sum((0, 1)))
        for axis in range(min(2, len(entry.shape))):
            others = [a + 2 for a in range(len(entry.shape)) if a != axis]
            torch.testing.assert_close(found.axis_sums[f"{entry.name}@{axis}"], part.sum(others) if others else part)
    assert set(found.importance) == {"conv.weight", "head.weight"}


def test_gradient_and_taylor_by_hand(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    x, y = tiny_data(20, torch.float64)
    model.zero_grad()
    F.cross_entropy(model.eval()(x), y).backward()
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    gradient, taylor = (score(trajectory, model, batches, c) for c in ("gradient", "taylor"))
    for name, p in model.named_parameters():
        if name in gradient.importance:
            torch.testing.assert_close(gradient.importance[name], p.grad.abs())
            torch.testing.assert_close(taylor.importance[name], (p.grad * p.detach()).abs())


def test_magnitude_and_random(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    magnitude = score(trajectory, model, criterion="magnitude")
    assert torch.equal(magnitude.importance["head.weight"], model.head.weight.detach().abs())
    one, same, other = (score(trajectory, model, criterion="random", seed=s) for s in (1, 1, 2))
    assert one.digest == same.digest != other.digest


def test_group_scores_are_exact_sums(tiny_run: Run) -> None:
    """A channel's influence: its weights' signed scores summed per sample and output, then absolute values."""
    model, trajectory = tiny_run
    x, y = tiny_data(5, torch.float64)
    scores = score(trajectory, model, [(x, y)], "influence")
    column = torch.arange(3)[:, None]
    members = {"conv.weight@0": column, "conv.bias@0": column, "head.weight@1": column}
    signed = scores.axis_sums["conv.weight@0"] + scores.axis_sums["conv.bias@0"] + scores.axis_sums["head.weight@1"]
    torch.testing.assert_close(scores.group(members), signed.abs().sum((0, 1)))
    blocks = {"head.weight@1": torch.tensor([[0, 2], [1, 1]])}
    expected = scores.axis_sums["head.weight@1"][..., [0, 1]] + scores.axis_sums["head.weight@1"][..., [2, 1]]
    torch.testing.assert_close(scores.group(blocks), expected.abs().sum((0, 1)))


def test_group_of_magnitudes_is_their_norm(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    scores = score(trajectory, model, criterion="magnitude")
    members = {"conv.weight@0": torch.arange(3)[:, None], "head.weight@1": torch.arange(3)[:, None]}
    expected = (model.conv.weight.detach().square().flatten(1).sum(1) + model.head.weight.detach().square().sum(0)).sqrt()
    torch.testing.assert_close(scores.group(members), expected)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_stands_in_the_docs(criterion: str) -> None:
    assert f"\n| `{criterion}` |" in (Path(__file__).parents[2] / "docs" / "criteria.md").read_text()


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_saved_scores_come_back_and_repeat_exactly(tiny_run: Run, tmp_path: Path, criterion: str) -> None:
    model, trajectory, batches, options = material(criterion, tiny_run, 20)
    first, second = (score(trajectory, model, batches, criterion, **options) for _ in range(2))
    first.save(tmp_path / "a.safetensors")
    second.save(tmp_path / "b.safetensors")
    back = Scores.load(tmp_path / "a.safetensors")
    assert back.digest == first.digest == second.digest
    assert back.provenance == first.provenance
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_ignored_parameters_have_no_importance_but_sums(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    scores = score(trajectory, model, [tiny_data(3, torch.float64)], ignore=["head.*"])
    assert set(scores.importance) == {"conv.weight"}
    assert "head.weight@1" in scores.axis_sums
    with pytest.raises(UsageError, match=r"'heads\.\*' matches no parameter"):
        score(trajectory, model, ignore=["heads.*"], criterion="magnitude")
    with pytest.raises(UsageError, match="nothing is left to prune"):
        score(trajectory, model, ignore=["*"], criterion="magnitude")


def test_one_checkpoint_has_no_path(tmp_path: Path) -> None:
    model = TinyNet()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    write_checkpoints(tmp_path / "t", model, [tmp_path / "m.safetensors"])
    trajectory = Trajectory(tmp_path / "t")
    score(trajectory, model, [tiny_data(3)], "taylor")
    with pytest.raises(PrunekitError, match="needs a training path of at least two states"):
        score(trajectory, model, [tiny_data(3)], "influence")
    with pytest.raises(PrunekitError, match="need scoring samples"):
        score(trajectory, model, [], "taylor")


@pytest.mark.slow
def test_checkpoints_make_a_path(tmp_path: Path) -> None:
    models = [TinyNet() for _ in range(3)]
    paths = []
    for number, model in enumerate(models):
        save_file(model.state_dict(), tmp_path / f"{number}.safetensors")
        paths.append(tmp_path / f"{number}.safetensors")
    write_checkpoints(tmp_path / "t", TinyNet(), paths)
    trajectory = Trajectory(tmp_path / "t")
    assert len(trajectory) == 2
    x, y = tiny_data(3)
    scores = score(trajectory, models[0], [(x, y)], "influence", nodes=64)
    total = sum(v.sum(2) for k, v in scores.axis_sums.items() if k.endswith("@0"))
    change = models[-1](x).detach() - models[0](x).detach()
    torch.testing.assert_close(total, change, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    ],
)
def test_online_equals_offline(tmp_path: Path, build: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = build(model.parameters())
    x, y = tiny_data(6, torch.float64, seed=3)
    data = tiny_data(24, torch.float64)
    with (
        OnlineInfluence(model, optimizer, x, y, ignore=["head.*"]) as online,
        Recorder(tmp_path / "t", model, optimizer, second_moments=True) as recorder,
    ):
        for step in range(9):
            indices = torch.arange(step, step + 8) % 24
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][indices]), data[1][indices]).backward()
            recorder.batch(indices)
            optimizer.step()
    offline = score(Trajectory(tmp_path / "t"), model, [(x, y)], ignore=["head.*"])
    found = online.scores()
    assert found.provenance["model"] == offline.provenance["model"]
    for name, tensor in {**offline.importance, **offline.axis_sums}.items():
        torch.testing.assert_close({**found.importance, **found.axis_sums}[name], tensor, atol=1e-12, rtol=1e-9)
    make_plan(found, model, sparsity=0.5)


def test_online_scores_that_do_not_fit_are_refused() -> None:
    model = TinyNet()
    x, y = tiny_data(6)
    with pytest.raises(PrunekitError, match="give fewer samples"):
        OnlineInfluence(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, memory=100).__enter__()


@pytest.mark.slow
def test_aggregations_agree_with_their_definitions(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    batches = [tiny_data(40, torch.float64)]
    function = ModelFunction(model, trajectory.layout)
    signed = torch.cat([p.scores["conv.weight"] for p in attribute(function, trajectory.segments, *batches[0])])
    expected = {"l1": signed.abs().sum((0, 1)), "l2": signed.square().sum((0, 1)).sqrt(), "abs_mean": signed.mean((0, 1)).abs()}
    for aggregation, importance in expected.items():
        found = score(trajectory, model, batches, aggregation=aggregation)
        torch.testing.assert_close(found.importance["conv.weight"], importance)
    old, new = (score(trajectory, model, batches, aggregation=name) for name in ("mean", "abs_mean"))
    assert old.digest == new.digest
    assert new.provenance["aggregation"] == "mean"  # what files have always said
    with pytest.raises(UsageError, match="aggregation 'l3' does not exist"):
        score(trajectory, model, batches, aggregation="l3")


@pytest.mark.slow
def test_shares_and_phases_add_up(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    batches = [tiny_data(4, torch.float64)]

    def sums(**options: object) -> Tensor:
        return score(trajectory, model, batches, **options).axis_sums["conv.weight@0"]  # type: ignore[arg-type]

    torch.testing.assert_close(sums(share="kernel") + sums(share="regularisation"), sums(share="whole"))
    torch.testing.assert_close(sums(phase=(0, 5)) + sums(phase=(5, 12)), sums())
    with pytest.raises(UsageError, match="phase is"):
        score(trajectory, model, batches, phase=(5, 13))


def test_survival_of_everything_is_the_trained_weight(tiny_run: Run) -> None:
    """For a linear function φ is constant, so Σ_s ω_s φ U_s + Π θ_0 φ = φ θ_N."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = record(Path(folder) / "t", model, optimizer)
        x, y = tiny_data(3, torch.float64)
        found = score(trajectory, model, [(x, y)], share="survival")
        expected = (x.flatten(1).abs().sum(0)[None] * model[1].weight.detach().abs()).expand(4, 16)
        torch.testing.assert_close(found.importance["1.weight"], expected)


def test_layers_and_heads_are_exact_sums(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    scores = score(trajectory, model, [tiny_data(5, torch.float64)])
    layers = scores.by_layer()
    assert set(layers) == {"conv", "head"}
    total = scores.axis_sums["head.weight@1"].sum(2) + scores.axis_sums["head.bias@0"].sum(2)
    torch.testing.assert_close(layers["head"], total)
    heads = scores.signed({"head.weight@0": torch.arange(4).view(2, 2)})
    assert heads.shape == (5, 4, 2)
    torch.testing.assert_close(heads.sum(2), scores.axis_sums["head.weight@0"].sum(2))


def test_untouched_weights_are_counted_and_named(tmp_path: Path) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(10, 3), nn.Linear(3, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(tokens).mean(1)))

    torch.manual_seed(0)
    model = Lookup()
    tokens = torch.randint(0, 10, (24, 5))
    trajectory = record(tmp_path / "t", model, torch.optim.AdamW(model.parameters(), lr=0.1), 6, (tokens, torch.arange(24) % 4))
    few = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    for criterion in ("influence", "taylor"):
        scores = score(trajectory, model, [(few, torch.tensor([0, 1]))], criterion)
        assert scores.findings["uncovered"] == {"table.weight": 7 * 3}


@pytest.mark.slow
def test_scoring_goes_on_with_finished_chunks(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are the user's, who presses Ctrl-C while the third of four batches is fetched to be scored."""
    model, trajectory = tiny_run
    x, y = tiny_data(200, torch.float64)
    fetched: list[int] = []
    interrupts = False

    def fetch(where: Sequence[int]) -> tuple[Tensor, Tensor]:
        if interrupts and where[0] == 100 and fetched.count(100) == 1:  # all samples are looked at once before
            raise KeyboardInterrupt
        fetched.append(where[0])
        return x[list(where)], y[list(where)]

    def scored(interrupted: bool = False, **changes: Any) -> Scores:
        nonlocal interrupts
        interrupts = interrupted
        fetched.clear()
        return score_evidence(replace(evidence, **changes), "influence")

    samples = Samples(fetch, [range(begin, begin + 50) for begin in range(0, 200, 50)])
    evidence = Evidence(trajectory, model, ("conv.weight", "head.weight"), samples)
    whole = scored()
    assert fetched[-4:] == [0, 50, 100, 150]
    monkeypatch.setattr(additive, "SECONDS_BETWEEN_SAVES", -1.0)
    partial = tmp_path / "partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scored(interrupted=True, partial=partial)
    assert fetched[-2:] == [0, 50]
    assert partial.exists()
    again = scored(partial=partial)
    assert fetched[-2:] == [100, 150]  # two of four chunks were kept
    assert fetched.count(50) == 1
    assert again.digest == whole.digest
    assert not partial.exists()
    with pytest.raises(KeyboardInterrupt):
        scored(interrupted=True, partial=partial)
    assert partial.exists()
    changed = scored(partial=partial, nodes=2)
    assert changed.digest == scored(nodes=2).digest


@pytest.mark.slow
def test_targets_of_sequences_and_regression(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)).double()
    tokens = torch.randint(0, 9, (24, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with Recorder(tmp_path / "t", model, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    trajectory = Trajectory(tmp_path / "t")
    for target, targets in (("outputs", 45), ("log_prob", 5), ("loss", 1), ("margin", 5)):
        found = score(trajectory, model, [(tokens[:3], tokens[:3])], target=target)
        assert found.axis_sums["1.weight@0"].shape == (3, targets, 9)
        function = ModelFunction(model, trajectory.layout, target=target)
        change = function(trajectory.state(-1), tokens[:3], tokens[:3]) - function(trajectory.state(0), tokens[:3], tokens[:3])
        whole = score(trajectory, model, [(tokens[:3], tokens[:3])], target=target, share="whole", nodes=8)
        total = sum(v.sum(2) for k, v in whole.axis_sums.items() if k.endswith("@0"))
        torch.testing.assert_close(total, change, atol=2e-2 * float(change.abs().max()), rtol=0)
    regression = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)).double()
    x = torch.randn(24, 1, 4, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(regression.parameters(), lr=0.05)
    with Recorder(tmp_path / "r", regression, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(regression(x), x.sum((1, 2, 3))).backward()
            optimizer.step()
    found = score(Trajectory(tmp_path / "r"), regression, [(x[:3], x[:3].sum((1, 2, 3)))], target="outputs")
    assert found.axis_sums["1.weight@1"].shape == (3, 1, 16)


def test_another_architecture_is_refused(tiny_run: Run) -> None:
    _, trajectory = tiny_run
    with pytest.raises(ArtifactError, match=r"not the recorded one: conv\.weight"):
        score(trajectory, nn.Linear(2, 2), criterion="magnitude")


def test_unknown_criterion_offers_near_names(tiny_run: Run) -> None:
    model, trajectory = tiny_run
    with pytest.raises(UsageError, match="did you mean magnitude"):
        score(trajectory, model, criterion="magnitud")


def damaged(tmp_path: Path, tensor: Tensor) -> Path:
    path = tmp_path / "scores.safetensors"
    scores = Scores({"w": torch.ones(2, 2)}, {}, {"criterion": "magnitude", "group": "l2", "prunable": ["w"]})
    scores.save(path)
    header = checkpoint.read_header(path)
    checkpoint.write_tensors(path, {"w": tensor}, header)
    return path


def test_scores_that_no_plan_can_be_made_of_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="w holds NaN or Inf"):
        Scores.load(damaged(tmp_path, torch.tensor([[1.0, float("nan")], [1, 1]])))
    with pytest.raises(ArtifactError, match="negative importance"):
        Scores.load(damaged(tmp_path, -torch.ones(2, 2)))
    with pytest.raises(ArtifactError, match="does not match its digest"):
        Scores.load(damaged(tmp_path, 2 * torch.ones(2, 2)))
    path = damaged(tmp_path, torch.ones(2, 2))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        Scores.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'scores'"):
        Scores.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    good = Scores({"w": torch.ones(2, 2)}, {}, {"criterion": "magnitude", "group": "l2"})
    good.save(path)
    before = path.read_bytes()
    with pytest.raises(NonFiniteError):
        Scores({"w": torch.full((2, 2), float("inf"))}, {}, good.provenance).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]
