"""Fine-tuning holds masks exactly, leaves the parent alone, and its steps complete the parent's path."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import ArtifactError, PrunekitError, Trajectory, UsageError, make_plan, score
from prunekit.apply import apply_masks
from prunekit.kernel import ModelFunction, attribute, data_scores, reconstruct
from prunekit.steps import Finetuning, Tuner, cut, finetune
from prunekit.trajectory import Continued, Recorder
from tests.conftest import TinyNet, record, tiny_data
from tests.structure_models import Residual

X, Y = tiny_data(24, torch.float64)
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1),
}


def how(optimizer: str = "adamw", **options: object) -> Finetuning:
    return Finetuning(lambda i: (X[i], Y[i]), len(X), OPTIMIZERS[optimizer], **{"epochs": 4, "batch_size": 8, **options})


def half_plan(trajectory: Trajectory, model: nn.Module, structure: str = "unstructured", sparsity: float = 0.5):
    return make_plan(score(trajectory, model, criterion="magnitude"), model, X[:2], sparsity=sparsity, structure=structure)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "channels"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_hold_exactly_and_the_path_is_complete(tmp_path: Path, tiny_run, optimizer: str, structure: str) -> None:
    """f(θ_0) + Σ over the parent's pieces, the pruning, the child's pieces = f(θ_final), in float64."""
    model, parent = tiny_run
    plan = half_plan(parent, model, structure)
    tuned = copy.deepcopy(model)
    before = parent.hash
    finetune(tuned, plan, how(optimizer), tmp_path / "child", parent)
    named = dict(tuned.named_parameters())
    for name, mask in plan.masks().items():
        assert torch.equal(named[name][~mask], torch.zeros_like(named[name][~mask]))
        assert bool((named[name][mask] != 0).all())
    Trajectory(parent.folder).verify()
    assert Trajectory(parent.folder).hash == before

    child = Trajectory(tmp_path / "child")
    path = Continued(parent, child)
    masked = copy.deepcopy(model)
    apply_masks(masked, plan.masks())
    assert torch.equal(path.joint.start, parent.state(-1))
    assert torch.equal(path.joint.end, child.layout.flatten(dict(masked.named_parameters())))
    assert torch.equal(path.state(-1), child.layout.flatten(named))
    function = ModelFunction(tuned, parent.layout)
    rebuilt = reconstruct(function, path.segments(), X, Y, tolerance=1e-6)
    torch.testing.assert_close(rebuilt.rebuilt, tuned(X).detach(), atol=1e-4, rtol=0)
    total = function(path.state(0), X, Y)
    for part in attribute(function, path.segments, X, Y, share="whole", tolerance=1e-4):
        for signed in part.scores.values():
            total[part.samples, part.targets] += signed.flatten(2).sum(2)
    torch.testing.assert_close(total, tuned(X).detach(), atol=5e-3, rtol=0)


def test_continued_path_reads_as_one_trajectory(tmp_path: Path, tiny_run) -> None:
    model, parent = tiny_run
    finetune(copy.deepcopy(model), half_plan(parent, model), how(), tmp_path / "child", parent)
    child = Trajectory(tmp_path / "child")
    path = Continued(parent, child)
    assert len(path) == path.pieces == len(parent) + 1 + len(child) == 12 + 1 + 12
    segments = list(path.segments())
    assert [s.index for s in segments] == list(range(25))
    assert [s.jump for s in segments] == [False] * 12 + [True] + [False] * 12
    for segment, after in itertools.pairwise(segments):
        assert torch.equal(segment.end, after.start)
    for index, segment in enumerate(segments):
        assert torch.equal(path.state(index), segment.start)
    assert not segments[12].data_update.any()
    assert [s.index for s in path.segments(begin=10, end=15)] == [10, 11, 12, 13, 14]
    strided = list(path.segments(5))
    assert [s.index for s in strided] == [0, 5, 10, 12, 13, 18, 23]
    with pytest.raises(UsageError, match="survival"):
        list(path.segments(survival=True))


def test_kernel_and_regularisation_shares_at_removed_weights_end_with_them(tmp_path: Path, tiny_run) -> None:
    """Momentum of weight decay must not outlive a weight: U and R of a removed one are 0 from its removal on."""
    model, parent = tiny_run
    tuned = copy.deepcopy(model)
    first, second = (half_plan(parent, model, sparsity=s).masks() for s in (0.3, 0.6))
    with Tuner(tuned, first, how("sgd"), tmp_path / "child", {"parent": {"trajectory": parent.hash, "step": 12}}) as tuner:
        tuner.run()
        tuner.shrink(second)
        tuner.run()
    child = Trajectory(tmp_path / "child")
    segments = list(child.segments())
    assert [s.index for s in segments if s.jump] == [12]
    gone = (
        child.layout.flatten(
            {n: second[n] if n in second else torch.ones(e.shape) for n, e in ((e.name, e) for e in child.layout)}
        )
        == 0
    )
    for segment in segments[13:]:
        assert not segment.data_update[gone].any()
        assert not segment.regularisation[gone].any()
        assert segment.regularisation[~gone].any()


def test_steps_with_shrinking_masks_are_those_of_a_loop_written_out(tmp_path: Path, tiny_run) -> None:
    model, parent = tiny_run
    tuned, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    first, second = (half_plan(parent, model, sparsity=s).masks() for s in (0.3, 0.6))
    with Tuner(tuned, first, how("adamw"), None, {}) as tuner:
        tuner.run(seed=5)
        tuner.shrink(second)
        tuner.run(seed=6)
    optimizer = OPTIMIZERS["adamw"](by_hand)
    apply_masks(by_hand, first)
    for masks, seed in ((first, 5), (second, 6)):
        apply_masks(by_hand, masks)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(4):
            for indices in torch.randperm(24, generator=generator).split(8):
                optimizer.zero_grad()
                F.cross_entropy(by_hand(X[indices]), Y[indices]).backward()
                optimizer.step()
                apply_masks(by_hand, masks)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), by_hand.parameters(), strict=True))


@pytest.mark.slow
def test_cut_model_computes_what_the_fine_tuned_masked_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().double()
    parent = record(tmp_path / "parent", model, torch.optim.AdamW(model.parameters(), lr=0.01), data=(X, Y))
    model.eval()
    plan = half_plan(parent, model, "channels")
    tuned = copy.deepcopy(model)
    finetune(tuned, plan, how(), tmp_path / "child", parent)
    tuned.eval()
    small = cut(tuned, plan, X[:2])
    torch.testing.assert_close(small(X), tuned(X))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in tuned.parameters())
    path = Continued(parent, Trajectory(tmp_path / "child"))
    rebuilt = reconstruct(ModelFunction(tuned, parent.layout, path.fixed), path.segments(), X, Y, tolerance=1e-3)
    torch.testing.assert_close(rebuilt.rebuilt, tuned(X).detach(), atol=1e-2, rtol=0)
    with pytest.raises(PrunekitError, match="where the plan removes them"):
        cut(model, plan, X[:2])


@pytest.mark.parametrize("every", [1, 3])
def test_jumps_are_read_back_between_steps(tmp_path: Path, every: int) -> None:
    """States around a jump are exact, with second moments and skipped states too, also while recording goes on."""
    torch.manual_seed(0)
    model = TinyNet().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)
    states: list[Tensor] = []

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

    def step(recorder: Recorder) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        recorder.batch(range(24))
        optimizer.step()
        states.append(flat())

    with Recorder(tmp_path / "t", model, optimizer, every=every, second_moments=True, snapshot_every=0) as recorder:
        states.append(flat())
        for _ in range(4):
            step(recorder)
        with recorder.jump():
            pass  # nothing changes: nothing is added
        with recorder.jump():
            apply_masks(model, {"conv.weight": torch.zeros(3, 1, 3, 3)})
        states.append(flat())
        recorder.flush()
        assert torch.equal(Trajectory(tmp_path / "t").state(-1), states[-1])
        for _ in range(4):
            step(recorder)
    trajectory = Trajectory(tmp_path / "t")
    trajectory.verify()
    assert len(trajectory) == 9
    assert [trajectory.step(s).moved for s in range(9)] == [s != 4 for s in range(9)]
    for index in range(10) if every == 1 else (0, 3, 4, 5, 9):
        assert torch.equal(trajectory.state(index), states[index]), index
    assert trajectory.second_moments(4) is None
    last = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    assert torch.equal(trajectory.second_moments(8), last)
    moved = sum((s.data_update + s.regularisation for s in trajectory.segments()), torch.zeros_like(states[0]))
    torch.testing.assert_close(moved, states[-1] - states[0])


def test_refusals(tmp_path: Path, tiny_run) -> None:
    model, parent = tiny_run
    plan = half_plan(parent, model)
    with pytest.raises(UsageError, match="parent"):
        finetune(copy.deepcopy(model), plan, how(), tmp_path / "a")
    finetune(copy.deepcopy(model), plan, how(epochs=1), tmp_path / "a", parent)
    with pytest.raises(ArtifactError, match="already holds"):
        finetune(copy.deepcopy(model), plan, how(epochs=1), tmp_path / "a", parent)
    child = Trajectory(tmp_path / "a")
    torch.manual_seed(1)
    other_model = TinyNet().double()
    other = record(tmp_path / "b", other_model, torch.optim.SGD(other_model.parameters(), lr=0.1))
    with pytest.raises(ArtifactError, match=f"{parent.hash}.*{other.hash}"):
        Continued(other, child)
    with pytest.raises(PrunekitError, match="masks held"):
        data_scores(ModelFunction(model, parent.layout), child, X, Y, lambda i: (X[list(i)], Y[list(i)]))
