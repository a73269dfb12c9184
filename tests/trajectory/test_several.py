"""Several processes record one training: under DDP the first writes, of a sharded model each its own rows, read as one."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import ArtifactError, Recorder, Run, Trajectory, checkpoint, score
from prunekit.kernel import ModelFunction, attribute, data_scores
from prunekit.trajectory import replay
from tests.trajectory import several
from tests.trajectory.several import CUT, STEPS, X, Y, adamw, indices, narrow, plain, steps

pytestmark = pytest.mark.slow


def run(folder: Path, what: str, count: int, ends: tuple[int, ...]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trajectory.several"])
    started = [context.Process(target=several.main, args=(rank, count, port, what, folder)) for rank in range(count)]
    for one in started:
        one.start()
    try:
        for one in started:
            one.join(240)
        assert tuple(one.exitcode for one in started) == ends
    finally:
        for one in started:
            one.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes do, in one start; in the end the second is killed."""
    folder = tmp_path_factory.mktemp("two")
    run(folder, "two", 2, (0, -9))
    return folder


@pytest.fixture(scope="module")
def three(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three processes go on with what two left, and what one."""
    folder = tmp_path_factory.mktemp("three")
    for name in ("killed", "cut-twice"):
        shutil.copytree(two / name, folder / name)
    model = narrow()
    optimizer = adamw(model)
    options: dict[str, Any] = {"second_moments": True, "snapshot_every": 2}
    states = [several.whole(several.coordinates(model))]
    with suppress(KeyboardInterrupt):
        states.extend(steps(Recorder(folder / "cut-one", model, optimizer, **options), model, optimizer, CUT))
    torch.save(states, folder / "cut-one.pt")
    run(folder, "three", 3, (0, 0, 0))
    return folder


def saved(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def batch(which: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    return X[which], Y[which]


def test_under_ddp_one_process_writes_and_the_path_is_the_mean_of_all(two: Path, tmp_path: Path) -> None:
    """Unequal batches, accumulated, clipped, with dropout of its own in each process: replayed by one process."""
    path = Trajectory(two / "ddp")
    path.verify()
    assert path.complete
    assert not (two / "ddp" / "part-0").exists()
    first, second = (saved(two / f"ddp-{rank}.pt") for rank in range(2))
    views = path.layout.views(path.state(-1))
    assert all(torch.equal(views[name], first[name]) and torch.equal(first[name], second[name]) for name in first)
    for step in range(STEPS):
        found = path.step(step)
        expected = [tuple(indices(2 * step + part, rank).tolist()) for rank in range(2) for part in range(2)]
        assert found.batches == tuple(expected)
        assert found.weights == (0.25,) * 4
        assert 0 < found.gradient_scale <= 1
    assert path.step(0).gradient_scale < 1
    model = plain(0.3)
    again = replay(path, model, adamw(model), batch, nn.functional.cross_entropy, tmp_path / "again", second_moments=True)
    torch.testing.assert_close(again.state(-1), path.state(-1), rtol=1e-4, atol=1e-6)


def test_under_ddp_data_wise_scores_are_complete(two: Path) -> None:
    """Σ_k + momentum = Σ_i ψ_i: what the noted samples did is all that the gradients did."""
    path, x, y = Trajectory(two / "ddp"), X[30:33], Y[30:33]
    function = ModelFunction(plain(0.3), path.layout, path.fixed)
    found = data_scores(function, path, x, y, batch, nodes=4)
    parts = attribute(function, path.segments, x, y, nodes=4, share="kernel")
    total = torch.cat([sum(v.flatten(2).sum(2) for v in part.scores.values()) for part in parts])
    torch.testing.assert_close(found.scores.sum(0) + found.momentum, total, atol=1e-5, rtol=1e-4)
    assert total.abs().max() > 0.01


def test_a_ddp_recording_goes_on_with_every_process_s_own_noise(two: Path) -> None:
    whole, again = Trajectory(two / "ddp"), Trajectory(two / "ddp-cut")
    assert [again.step(s) for s in range(STEPS)] == [whole.step(s) for s in range(STEPS)]
    assert again.hash == whole.hash


@pytest.mark.parametrize("name", ["watched", "watched-sharded"])
def test_watched_loaders_tell_what_every_process_saw(two: Path, name: str) -> None:
    """Two accumulated batches a step, also where gradients come to whole parameters first (fully_shard)."""
    seen = [json.loads((two / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    path = Trajectory(two / name)
    per_epoch = len(seen[0]) // 2
    pairs = [[b for b in (2 * i, 2 * i + 1) if b < per_epoch] for i in range(-(-per_epoch // 2))]
    expected = [[seen[rank][e * per_epoch + b] for rank in range(2) for b in pair] for e in range(2) for pair in pairs]
    assert [[list(b) for b in path.step(s).batches or ()] for s in range(len(path))] == expected
    assert {k for one in expected for b in one for k in b} == set(range(23))


@pytest.mark.parametrize("name", ["fsdp", "replicated"])
def test_shards_are_joined_to_the_bit(two: Path, name: str) -> None:
    """Rows that do not divide, none in one process, a frozen layer; torch's own whole tensors say what was there."""
    path, held = Trajectory(two / name), saved(two / f"{name}.pt")
    path.verify()
    assert path.complete
    for index, state in enumerate(held["states"]):
        assert torch.equal(path.state(index), state)
    trained = sum(entry.size for entry in path.layout.parameters)
    for index, moments in enumerate(held["moments"]):
        found = path.second_moments(index)
        assert found is not None
        assert torch.equal(found[:trained], moments)
    fixed = path.fixed
    assert torch.equal(torch.cat([fixed["3.weight"].reshape(-1), fixed["3.bias"]]), held["frozen"])
    assert int(fixed["1.num_batches_tracked"]) == STEPS
    path.layout.check(narrow())


def test_a_process_writes_its_own_rows_alone(two: Path) -> None:
    sizes = [sum(p.stat().st_size for p in (two / "fsdp" / "part-0" / f"rank-{rank}").glob("states-*")) for rank in range(2)]
    path = Trajectory(two / "fsdp")
    assert sum(sizes) == 2 * 256 + (STEPS + 1) * 4 * path.layout.total
    rows = [sum(b - a for a, b in one) for one in path.header["parts"][0]["spans"]]
    assert path.bytes > 2 * sum(sizes)
    assert sizes == [256 + (STEPS + 1) * 4 * count for count in rows]


def test_states_in_half_precision_and_skipped_ones(two: Path) -> None:
    path, held = Trajectory(two / "half"), saved(two / "half.pt")
    assert path.kept == {0, 2, 4, 6, 8, 9}
    for index in path.kept:
        step = (held["states"][9] - held["states"][0]).abs().max()
        assert (path.state(index) - held["states"][index]).abs().max() < 2e-3 * step


def test_scores_of_a_joined_path_are_certified_as_of_one_process(two: Path, tmp_path: Path) -> None:
    model = narrow()
    optimizer = adamw(model)
    list(steps(Recorder(tmp_path / "one", model, optimizer, second_moments=True), model, optimizer))
    errors = []
    for folder in (two / "fsdp", tmp_path / "one"):
        found = score(Trajectory(folder), narrow(), [(X[30:36], Y[30:36])], criterion="influence")
        assert max(float(v.max()) for v in found.importance.values()) > 1e-3
        errors.append(found.findings["error"]["relative"])
    assert 0 < errors[0] < 2 * errors[1]


def test_weights_that_one_process_set_are_a_piece_for_all(two: Path) -> None:
    path, states = Trajectory(two / "set"), saved(two / "set.pt")
    assert [path.step(s).moved for s in range(len(path))] == [True, False, True, False, True, False]
    for index, state in enumerate(states[:-1]):
        assert torch.equal(path.state(index), state)
    trained = sum(entry.size for entry in path.layout.parameters)
    assert torch.equal(path.state(-1)[:trained], states[-1])


def test_what_the_processes_do_not_share_is_refused_by_name(two: Path) -> None:
    said = [json.loads((two / f"refusals-{rank}.json").read_text()) for rank in range(2)]
    for name, words in {
        "folders": "process 1 records into",
        "options": "process 1 records with",
        "optimizers": "another optimizer than process 0",
        "zero": "ZeroRedundancyOptimizer",
        "there": "already holds a trajectory",
        "one fails": "every is 0; it must be 1 or more",
        "weights": "process 1 begins from other weights",
        "placement": r"0.weight is spread over devices as Shard(dim=1)",
        "partly": "3.weight is trained and not sharded",
        "join": "DistributedDataParallel.join",
        "sampler": "deals samples out to 2 processes, and 1 record together",
    }.items():
        for rank in range(2):
            assert words in said[rank][name], (name, rank)
            assert "\n" not in said[rank][name]
    assert "became NaN or Inf" in said[1]["nan"]
    heard = ("another of the 2 processes", "process 1 of 2: step 0: 0.weight became NaN")  # who is first decides
    assert any(words in said[0]["nan"] for words in heard)
    assert not Trajectory(two / "nan").complete
    assert len(Trajectory(two / "nan")) == 0


def test_a_process_killed_while_it_writes_leaves_the_last_whole_state(two: Path) -> None:
    path, held = Trajectory(two / "killed"), saved(two / "fsdp.pt")
    assert not path.complete
    assert len(path) == 6
    for index in range(7):
        assert torch.equal(path.state(index), held["states"][index])


def test_the_same_processes_go_on(two: Path) -> None:
    path, held = Trajectory(two / "cut-same"), saved(two / "fsdp.pt")
    path.verify()
    assert len(path.header["parts"]) == 1
    assert all(torch.equal(path.state(i), held["states"][i]) for i in range(STEPS + 1))
    assert [path.step(s) for s in range(STEPS)] == [Trajectory(two / "fsdp").step(s) for s in range(STEPS)]


@pytest.mark.parametrize(("name", "earlier", "before"), [("killed", 2, 6), ("cut-twice", 2, 6), ("cut-one", 1, 6)])
def test_other_processes_go_on(two: Path, three: Path, name: str, earlier: int, before: int) -> None:
    """Three processes after two, and after one: what was is as it was, to the bit; what comes is theirs."""
    path, went = Trajectory(three / name), saved(three / f"{name}-on.pt")
    states = saved(three / "cut-one.pt") if earlier == 1 else saved(two / "fsdp.pt")["states"]
    assert went["before"] == before
    assert len(path.header["parts"]) == 2
    assert len(path.header["parts"][1]["spans"]) == 3
    for index in range(before + 1):
        assert torch.equal(path.state(index), states[index])
    assert len(went["states"]) == len(path) - before + 1
    for index, state in enumerate(went["states"]):
        assert torch.equal(path.state(before + index), state)
    assert path.complete == (name != "cut-twice")
    path.verify()
    assert len(path.step(0).batches or ()) == earlier
    assert len(path.step(before).batches or ()) == 3


@pytest.mark.parametrize("where", ["two", "three"])
def test_one_process_goes_on_with_what_several_left(where: str, two: Path, three: Path, tmp_path: Path) -> None:
    """Of three after two, and of two: the recording ends whole, and its rows prove themselves."""
    name, origin = ("cut-fewer", two) if where == "two" else ("cut-twice", three)
    shutil.copytree(origin / name, tmp_path / "t")
    held = saved(two / "fsdp.pt")
    model = narrow()
    optimizer = adamw(model)
    recorder = Recorder.resume(tmp_path / "t", model, optimizer)
    assert recorder.steps == 6
    row = torch.cat([t.detach().reshape(-1) for t in several.coordinates(model)])
    assert torch.equal(row, held["states"][6])
    states = list(steps(recorder, model, optimizer))
    path = Trajectory(tmp_path / "t")
    path.verify()
    assert path.complete
    for index in range(STEPS + 1):
        assert torch.equal(path.state(index), held["states"][index] if index <= 6 else states[index - 7])
    trained = sum(entry.size for entry in path.layout.parameters)
    found = path.second_moments(5)
    assert found is not None
    assert torch.equal(found[:trained], held["moments"][5])
    part = next((tmp_path / "t" / "part-0" / "rank-1").glob("states-*"))
    part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="changed after it was recorded"):
        Trajectory(tmp_path / "t").verify()


def test_a_run_is_made_around_a_recording_of_several(two: Path, tmp_path: Path) -> None:
    run = Run.from_recording(tmp_path / "run", two / "fsdp", model=narrow)
    run.trajectory.verify()
    assert run.trajectory.folder != two / "fsdp"
    assert torch.equal(run.trajectory.state(-1), saved(two / "fsdp.pt")["states"][-1])


def test_parts_that_do_not_add_up_are_refused(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "fsdp", tmp_path / "t")
    header = checkpoint.read_json(tmp_path / "t" / "trajectory.json")
    header["parts"][0]["spans"][1].pop()
    checkpoint.write_json(tmp_path / "t" / "trajectory.json", header)
    with pytest.raises(ArtifactError, match="does not add up to whole states"):
        Trajectory(tmp_path / "t")
    shutil.rmtree(tmp_path / "t" / "part-0" / "rank-1")
    shutil.copy(two / "fsdp" / "trajectory.json", tmp_path / "t" / "trajectory.json")
    with pytest.raises(ArtifactError, match="rank-1"):
        Trajectory(tmp_path / "t").state(0)
