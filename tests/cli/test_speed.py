"""Speed that is asked for: searched and verified beside the dense model, and so said by eval and latency. No clock runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from prunekit.batch import size
from prunekit.measure import latency
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import Cli


class Machine:
    """A pass takes as long as the model has parameters, on a machine that slows down all the time, is noisy, and becomes busy."""

    def __init__(self, slower: float = 0.0, noise: float = 0.01, fixed: float = 0.0) -> None:
        self.slower, self.noise, self.fixed, self.busy_after = slower, noise, fixed, 10**9
        self.passes, self.random = 0, np.random.default_rng(0)

    def __call__(self, model: nn.Module, inputs: Any) -> float:
        self.passes += 1
        ms = self.fixed + size(inputs) * sum(p.numel() for p in model.parameters()) / 1e5
        ms *= 10 if self.passes > self.busy_after else 1
        return ms * (1 + self.slower * self.passes) * float(np.exp(self.noise * self.random.standard_normal()))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(latency, "one_pass", found)
    return found


def pruned(run: Path, cli: Cli, *options: object) -> dict[str, Any]:
    done = cli("prune", run, "-c", "magnitude", "--structure", "channels", "--name", "fast", "--json", *options)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_a_speedup_is_reached_and_eval_and_latency_say_the_same(run: Path, cli: Cli, machine: Machine, measured: None) -> None:
    machine.slower = 1e-3
    found = pruned(run, cli, "--speedup", 1.8)
    speed = found["speed"]
    assert found["budget"] == {"speedup": 1.8}
    assert 1.8 <= speed["low"] <= found["reached"] == speed["speedup"] <= speed["high"]
    assert found["reached"] < 2.4  # and no faster than is needed: a channel more or less is a tenth here
    kept, total = found["parameters"]["kept"], found["parameters"]["total"]
    assert total / kept == pytest.approx(found["reached"], rel=0.03)
    told = json.loads(cli("eval", run / "pruned" / "fast", "--json").out)
    later = told["latency"]["batches"]["64"]
    assert max(later["low"], speed["low"]) <= min(later["high"], speed["high"])
    assert "torch.compile off" in told["latency"]["conditions"]
    line = cli("eval", run / "pruned" / "fast").out.strip().splitlines()[-1]
    assert f"× at batch 64 ({later['pruned_ms']:#.3g} ms" in line
    assert "; asked 1.8)" in line
    timed = json.loads(cli("latency", run / "pruned" / "fast", "--batch", "64", "--json").out)["batches"]["64"]
    assert timed["speedup"]["median"] == pytest.approx(found["reached"], rel=0.03)


def test_milliseconds_are_asked_of_the_machine_as_it_was_at_first(run: Path, cli: Cli, machine: Machine) -> None:
    """It is ten times slower during the search; the model is no smaller for that."""
    opened = Run(run)
    dense = 64 * sum(p.numel() for p in opened.model.parameters()) / 1e5
    machine.busy_after = 30
    found = pruned(run, cli, "--max-latency-ms", 0.8 * dense)
    kept, total = found["parameters"]["kept"], found["parameters"]["total"]
    assert 0.45 * total < kept < 0.9 * total
    assert 0 < found["reached"] <= 0.8 * dense
    shown = cli("prune", run, "-c", "magnitude", "--structure", "channels", "--name", "fast", "--max-latency-ms", 0.8 * dense)
    assert "reached" in shown.out
    assert f"asked {0.8 * dense:g})" in shown.out.strip().splitlines()[-1]


def test_nothing_has_to_go_for_what_is_there(run: Path, cli: Cli, machine: Machine) -> None:
    assert pruned(run, cli, "--max-latency-ms", 1000)["achieved"] == 0
    assert pruned(run, cli, "--speedup", 1, "--overwrite")["achieved"] == 0


@pytest.mark.parametrize("budget", [("--max-latency-ms", 1e-9), ("--speedup", 1e5)])
def test_what_cannot_be_reached_is_said_with_what_is(run: Path, cli: Cli, machine: Machine, budget: tuple[object, ...]) -> None:
    done = cli("prune", run, "-c", "magnitude", *budget, "--structure", "channels", "--name", "never")
    assert done.code == 1
    assert "the fastest plan that could be made of channels reaches" in done.err
    assert not (run / "pruned" / "never").exists()


def test_pruned_in_rounds_it_is_measured_at_the_end(run: Path, cli: Cli, machine: Machine) -> None:
    found = pruned(run, cli, "--speedup", 1.5, "--schedule", "iterative", "--rounds", 2)
    small = found["parameters"]["total"] / found["parameters"]["kept"]
    assert found["reached"] == found["speed"]["speedup"] == pytest.approx(small, rel=0.03)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--speedup", 3), "the structure is unstructured: masks save no time in dense kernels"),
        (("--speedup", 3, "--structure", "2:4"), "the structure is 2:4: masks save no time in dense kernels"),
        (("--speedup", 0.9, "--structure", "channels"), "speedup is 0.9"),
        (("--speedup", 3, "--sparsity", 0.5, "--structure", "channels"), "one of them decides"),
        (("--speedup", 3, "--max-macs", 9, "--structure", "channels"), "one of them decides"),
    ],
)
def test_speed_that_makes_no_sense_is_refused(run: Path, cli: Cli, options: tuple[object, ...], said: str) -> None:
    done = cli("prune", run, "-c", "magnitude", *options)
    assert done.code == 2
    assert said in done.err


def test_a_model_that_computes_less_and_is_no_faster_says_why(run: Path, cli: Cli, machine: Machine) -> None:
    machine.fixed = 1e3
    done = cli("eval", run / "pruned" / "small", "--overwrite")
    assert "hardly faster: " in done.out.strip().splitlines()[-1], done.err


def test_latency_before_anything_is_pruned(run: Path, cli: Cli, machine: Machine) -> None:
    done = cli("latency", run, "--batch", "1,16", "--threads", 1)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "latency: dense"
    total = sum(p.numel() for p in Run(run).model.parameters())
    assert [float(line.split()[1]) for line in lines[2:4]] == pytest.approx([total / 1e5, 16 * total / 1e5], rel=0.02)
    assert "1 threads" in done.out
    assert "channels_last off" in done.out
    machine.noise = 3.0
    assert "batch 1, 64: the machine was too noisy" in cli("latency", run).out


def test_latency_refuses_what_is_no_model_and_no_batch(run: Path, cli: Cli, tmp_path: Path) -> None:
    assert "neither a run folder" in cli("latency", tmp_path / "nothing").err
    done = cli("latency", run, "--batch", "1,0")
    assert done.code == 2
    assert "--batch is 1,0" in done.err
