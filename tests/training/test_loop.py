"""The training loop: which samples a step sees, batches made again from recorded seeds, rates, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit.kernel import ModelFunction, attribute, data_scores
from prunekit.recipe import RateSchedule, scheduler_of
from prunekit.training import AUGMENTATIONS, TrainOptions, augmented, batches_per_epoch, train
from prunekit.training.augment import step_seed
from prunekit.trajectory import Recorder, Trajectory

flip = AUGMENTATIONS["horizontal_flip"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def images(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 2, 3, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def trained(
    folder: Path,
    samples: int = 23,
    end: int | None = None,
    after_epoch: Callable[[int], bool] = lambda epochs: False,
    **options: object,
) -> tuple[nn.Module, Trajectory]:
    """Batches of 5, SGD with momentum; recorded."""
    model, (x, y) = net(), images(samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with Recorder(folder, model, optimizer) as recorder:
        train(
            model, optimizer, None, TrainOptions(lambda i: (x[i], y[i]), samples, epochs=3, batch_size=5, seed=4, **options),
            recorder=recorder, end=end, after_epoch=after_epoch,
        )  # type: ignore[arg-type]  # fmt: skip
    return model, Trajectory(folder)


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 300), size=st.integers(1, 50))
def test_dropping_the_last_batch_leaves_whole_ones(samples: int, size: int) -> None:
    whole, dropped = batches_per_epoch(samples, size), batches_per_epoch(samples, size, drop_last=True)
    assert whole == len(range(0, samples, size))
    assert dropped == max(1, len([begin for begin in range(0, samples, size) if begin + size <= samples]))


def test_the_paper_s_run_has_468_steps() -> None:
    assert 12 * batches_per_epoch(10_000, 256, drop_last=True) == 468


@pytest.mark.parametrize("drop", [False, True])
def test_an_epoch_sees_every_sample_at_most_once(tmp_path: Path, drop: bool) -> None:
    _, path = trained(tmp_path, drop_last=drop)
    batches = [list(path.step(s).batches[0]) for s in range(len(path))]  # type: ignore[index]
    per_epoch = 4 if drop else 5
    assert [len(batch) for batch in batches] == ([5] * 4 if drop else [5, 5, 5, 5, 3]) * 3
    for epoch in range(3):
        seen = [k for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for k in batch]
        assert len(set(seen)) == len(seen) == (20 if drop else 23)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_flips_mirror_whole_images_or_leave_them(seed: int) -> None:
    x, _ = images(40)
    found = flip(x, torch.Generator().manual_seed(seed))
    mirrored = [bool((new == old.flip(-1)).all()) for new, old in zip(found, x, strict=True)]
    assert all(was or bool((new == old).all()) for was, new, old in zip(mirrored, found, x, strict=True))
    assert 4 < sum(mirrored) < 36  # a fair coin stays inside in all but one of 10^6 draws
    assert found.equal(flip(x, torch.Generator().manual_seed(seed)))


def test_step_seeds_differ_between_runs_and_steps() -> None:
    assert len({step_seed(seed, step) for seed in (0, 1, 2**31 - 1) for step in (0, 1, 2**31 - 1)}) == 9
    torch.Generator().manual_seed(step_seed(2**31 - 1, 2**31 - 1))  # torch takes it


def test_every_augmented_batch_can_be_made_again(tmp_path: Path) -> None:
    """Plain SGD's steps follow from the recorded indices and seeds alone."""
    _, path = trained(tmp_path, augment=flip)
    (x, y), model = images(23), net()
    again = augmented(lambda i: (x[i], y[i]), flip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    seeds = [path.step(s).seeds[0] for s in range(len(path))]
    assert len(set(seeds)) == len(seeds)
    for step in range(len(path)):
        found = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(found, path.state(step), atol=1e-12, rtol=1e-12)
        optimizer.zero_grad()
        inputs, labels = again(torch.tensor(path.step(step).batches[0]), seeds[step])  # type: ignore[index]
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


@pytest.mark.slow
def test_data_scores_of_augmented_training_sum_to_the_weights(tmp_path: Path) -> None:
    """``Σ_k score_k = Σ_i ψ_i``: it breaks when a batch is made again otherwise than the step saw it."""
    model, path = trained(tmp_path, augment=flip)
    (x, y), function = images(23), ModelFunction(model, path.layout)
    batch = augmented(lambda i: (x[i], y[i]), flip)
    by_sample = data_scores(function, path, x[:3], y[:3], batch, nodes=4).scores.sum(0)
    parts = list(attribute(function, path.segments, x[:3], y[:3], nodes=4))
    by_weight = sum(score.flatten(2).sum(-1) for part in parts for score in part.scores.values())
    torch.testing.assert_close(by_sample, by_weight, atol=1e-10, rtol=1e-8)
    plain = data_scores(function, path, x[:3], y[:3], lambda i, seed: (x[i], y[i]), nodes=4).scores.sum(0)
    assert not torch.allclose(plain, by_weight, atol=1e-6)


def test_a_resumed_run_augments_as_the_uninterrupted_one(tmp_path: Path) -> None:
    _, whole = trained(tmp_path / "whole", augment=flip)
    model, (x, y) = net(), images(23)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for begin, end in ((0, 7), (7, None)):
        train(
            model, optimizer, None, TrainOptions(lambda i: (x[i], y[i]), 23, epochs=3, batch_size=5, seed=4, augment=flip),
            begin=begin, end=end,
        )  # fmt: skip
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), whole.state(-1), atol=0, rtol=0)


def test_training_ends_after_the_epoch_that_says_so(tmp_path: Path) -> None:
    asked: list[int] = []

    def enough(epochs: int) -> bool:
        asked.append(epochs)
        return epochs == 2

    _, path = trained(tmp_path, after_epoch=enough)
    assert (asked, len(path), path.complete) == ([1, 2], 10, True)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(2, 60), warmup=st.floats(0.05, 0.95))
def test_triangular_rates_lie_on_two_straight_lines(steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule = scheduler_of(optimizer, steps, RateSchedule(name="triangular", warmup=warmup))
    for step in range(steps + 1):
        peak = warmup * steps
        expected = step / peak if step < peak else (steps - step) / (steps - peak)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * expected, abs=1e-12)
        optimizer.step()
        schedule.step()
