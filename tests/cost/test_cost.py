"""The cost model counts what the code does: passes, weights, bytes over the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.zoo.operators import declare
from prunekit.cost import Machine, Shape, Work, counterfactual, evaluate, learn, refine, score_path
from prunekit.models import llama
from prunekit.structure.prunable import prunable_parameters
from prunekit.trajectory import Layout

declare()  # without torchvision's compiled operators transformers cannot be imported beside it
SIZES = {"vocabulary": 64, "width": 24, "layers": 3, "heads": 4, "kv_heads": 2, "hidden": 40}
SHAPE = Shape(parameters=1000, prunable=800, macs=5000.0, kept=100.0, axes=30)
EVEN = Machine(forward=1e6, backward=1e6, sweep=1e6, wire=1e6, wait=0.0)


def test_a_shape_by_its_sizes_is_that_of_the_model() -> None:
    length = 16
    model = llama(**SIZES, length=length, tied=False).eval()
    tokens = torch.zeros(2, length, dtype=torch.long)
    names = set(prunable_parameters(model, Layout.of(model), ["*embed*", "*head*"], ()))
    found = Shape.of(model, tokens, sum(p.numel() for name, p in model.named_parameters() if name in names))
    computed = Shape.transformer(**SIZES, length=length)
    assert computed.parameters == found.parameters
    assert computed.prunable == found.prunable
    assert computed.macs == pytest.approx(found.macs)


@pytest.mark.parametrize("samples", [7, 8])
def test_workers_share_passes_and_not_what_goes_over_all_weights(samples: int) -> None:
    one, two = (score_path(SHAPE, samples=samples, pieces=5, memory=1e9, checked=False, workers=count) for count in (1, 2))
    chosen = [score_path(SHAPE, samples=own, pieces=0, memory=1e9, checked=False).forward for own in (samples, -(-samples // 2))]
    assert two.forward - chosen[1] == (one.forward - chosen[0]) * -(-samples // 2) / samples
    assert one.wire == 0
    assert two.wire == 8 * (SHAPE.prunable + samples * SHAPE.axes)  # half of the ring's two rounds
    alone, both = (learn(SHAPE, steps=3, batch=samples, workers=count) for count in (1, 2))
    assert alone.swept == both.swept
    assert both.wire == 3 * 4 * SHAPE.prunable


def test_time_is_the_sum_of_its_parts() -> None:
    work = Work(forward=2, backward=3, swept=4e6, wire=5e6)
    assert work.seconds(SHAPE, EVEN) == pytest.approx(2 * 2 * 5000 / 1e6 + 3 * 4 * 5000 / 1e6 + 4 + 5)
    again = work.then(work.times(2))
    assert again.seconds(SHAPE, EVEN) == pytest.approx(3 * work.seconds(SHAPE, EVEN))
    memory = evaluate(SHAPE, 4).then(learn(SHAPE, steps=1, batch=2)).memory
    assert memory == learn(SHAPE, steps=1, batch=2).memory


def test_chunks_that_memory_forces_walk_the_path_again() -> None:
    wide = score_path(SHAPE, samples=8, pieces=5, memory=1e9, checked=False)
    tight = score_path(SHAPE, samples=8, pieces=5, memory=3 * 4 * 1000 * 2, checked=False)
    assert tight.read == 4 * wide.read
    assert tight.forward == wide.forward
    assert tight.memory["scores in work"] < wide.memory["scores in work"]


def test_blocks_that_are_run_again_keep_less_and_compute_more() -> None:
    shape = Shape.transformer(**SIZES, length=64)
    kept, again = (learn(shape, steps=1, batch=8, checkpointing=asked) for asked in (False, True))
    assert again.memory["activations"] < kept.memory["activations"]
    assert again.forward == 1.5 * kept.forward


def test_retraining_is_dealt_out_whole() -> None:
    one = counterfactual(SHAPE, steps=10, batch=4)
    assert counterfactual(SHAPE, steps=10, batch=4, retrained=5, workers=2).forward == 3 * one.forward
    short, long = (refine(SHAPE, samples=8, accept=4, rounds=rounds, steps=0, nodes=8) for rounds in (2, 4))
    assert long.backward - short.backward == 8 * (2 + 8 + 1)  # influence of every sample twice, blame's nodes once, gain once


def test_rates_are_measured_with_what_is_given() -> None:
    calls: list[tuple[str, int]] = []
    found = Machine.here(SHAPE, lambda n: calls.append(("forward", n)), lambda n: calls.append(("both", n)), 4)
    assert min(found.forward, found.backward, found.sweep, found.read) > 0
    assert calls == [(name, n) for name in ("forward", "both") for n in (4, 1) for _ in range(6)]


def test_what_a_pass_takes_beside_its_samples_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(work: Callable[[], Any]) -> float:
        took = work()
        return took if isinstance(took, float) else 1.0

    monkeypatch.setattr("prunekit.cost.machine._seconds", seconds)
    shape = Shape(parameters=10, prunable=10, macs=1e6)
    found = Machine.here(shape, lambda n: 0.02 + 0.01 * n, lambda n: 0.06 + 0.03 * n, 6)
    assert found.start_forward == pytest.approx(0.02)
    assert found.start_backward == pytest.approx(0.04)
    assert found.forward == pytest.approx(2e6 / 0.01)
    assert found.backward == pytest.approx(4e6 / 0.02)
    work = Work(forward=12, backward=6, forwards=2, backwards=1)
    assert work.seconds(shape, found) == pytest.approx(2 * (0.02 + 6 * 0.01) + 0.04 + 6 * 0.02)


def test_small_batches_start_more_passes() -> None:
    few, many = evaluate(SHAPE, 64, batch=4), evaluate(SHAPE, 64, batch=64)
    assert (few.forward, many.forward) == (64, 64)
    assert (few.forwards, many.forwards) == (16, 1)


def test_the_mean_of_two_measurements_takes_the_mean_time() -> None:
    other = Machine(forward=3e6, backward=1e6, sweep=1e6, wire=1e6, wait=0.0, start_forward=0.2)
    work = Work(forward=6, forwards=2, fresh=1e6)  # what costs nothing in both costs nothing
    both = (work.seconds(SHAPE, EVEN) + work.seconds(SHAPE, other)) / 2
    assert work.seconds(SHAPE, EVEN.mean(other)) == pytest.approx(both)
