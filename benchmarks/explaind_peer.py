"""How does prunekit compare with ExPLAIND's authors' own code (PyPI `explaind` 0.1.0): scores, error, time, memory?

Both explain the same runs, recorded in one loop: the digits CNN under SGD and under AdamW, all ten log-probabilities.

    python benchmarks/explaind_peer.py [--quick]

Exits 1 if a goal is missed, 2 if explaind is not there. Time is processor seconds of one thread each (what a wall clock
shows on an idle machine), so that a busy machine slows neither. Memory is read from /proc, hence Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from prunekit.data import digits
from prunekit.kernel import ModelFunction, attribute, data_scores, reconstruct
from prunekit.measure import machine
from prunekit.models import digits_cnn
from prunekit.trajectory import Recorder, Trajectory

INSTALL = "explaind is not there: pip install --no-deps --ignore-requires-python explaind==0.1.0 (and pip install tqdm)"
CLASSES, BATCH = 10, 50  # batches of one size: explaind divides its whole buffer by the current batch's
SEED = 1  # one with which SGD leaves the plateau early enough to have learned something in 200 steps
SPLITS = {"test": 177, "validation": 110, "scoring": 110}  # leaves 1,400 samples for training
TRAIN = (500, 1400)  # the cases train on the first number, which keeps explaind's buffer small
TOLERANCE = 1e-3  # of reconstruct, per sample and step
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One training run. ``steps``: by default and in a quick run."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, float]
    steps: tuple[int, int]

    @property
    def adaptive(self) -> bool:
        return self.optimizer is torch.optim.AdamW


CASES = (
    Case("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}, (200, 30)),
    Case("AdamW", torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}, (60, 20)),
)


@dataclass
class Goals:
    """What was asked for and whether it is there."""

    missed: list[str] = field(default_factory=list)

    def at_most(self, what: str, value: float, limit: float, judged: bool = True) -> None:
        self._note(f"{what}: {value:.4g} (at most {limit:.4g})", value <= limit, judged)

    def at_least(self, what: str, value: float, limit: float, judged: bool = True) -> None:
        self._note(f"{what}: {value:.7g} (at least {limit:.7g})", value >= limit, judged)

    def _note(self, line: str, met: bool, judged: bool) -> None:
        print(f"  goal {line}: {('met' if met else 'MISSED') if judged else 'not judged in a quick run'}", flush=True)
        if judged and not met:
            self.missed.append(line)


@dataclass(frozen=True)
class Cost:
    """Seconds of this process (all its threads) and on the clock."""

    processor: float
    clock: float


def timed(call: Callable[[], T]) -> tuple[T, Cost]:
    processor, clock = time.process_time(), time.perf_counter()
    found = call()
    return found, Cost(time.process_time() - processor, time.perf_counter() - clock)


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# -- one run, recorded by either or both ------------------------------------------------------------------------------


class Peer:
    """explaind's wrappers around one run.

    Every list of checkpoints is given, since the default is one list that all instances share; buffers are float32.
    """

    def __init__(self, case: Case, model: nn.Module, x: Tensor, y: Tensor) -> None:
        from explaind.data_paths import DataPath
        from explaind.model_paths import ModelPath
        from explaind.optimizer_paths import AdamWOptimizerPath, SGDOptimizerPath
        from torch.utils.data import DataLoader, TensorDataset

        data = TensorDataset(x, y)
        data.targets = y.tolist()  # type: ignore[attr-defined]  # DataPath wants it, and replaces it
        cpu: dict[str, Any] = {"device": torch.device("cpu")}
        more = {"track_lr": True, "track_weight_decay": True} if case.adaptive else {"buffer_float16": False}
        self.samples = len(x)
        self.model = ModelPath(model, checkpoints=None, output_dim=CLASSES, **cpu)
        wrapper = AdamWOptimizerPath if case.adaptive else SGDOptimizerPath
        self.path = wrapper(self.model, checkpoints=[], **case.options, **more, **cpu)
        self.data = DataPath(DataLoader(data), full_batch=False)

    def after_step(self, x: Tensor, y: Tensor, indices: Tensor) -> None:
        self.data.log_batch(x, y, indices)
        self.model.log_checkpoint()
        self.path.log_checkpoint()

    def explain(self, x: Tensor, nodes: int, matrix: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """All that one ``predict`` gives; it cannot leave the parameter-wise part out (it fails at step 0).

        Without ``y_test``, because with it ``param_kernel`` starts again after step 0.

        Returns:
            rebuilt outputs ``(samples, outputs)``, parameter-wise scores ``(samples, outputs, P)``, and with ``matrix``
            data-wise scores, not yet divided by the batch size, ``(training samples, samples, outputs)``.
        """
        import explaind.epk_model as epk
        from tqdm import tqdm

        epk.tqdm = partial(tqdm, total=len(self.data), mininterval=10, leave=False)  # its own bar, with the time left
        eps = 1 if nodes == 1 else 1 / nodes
        peer = epk.ExactPathKernelModel(
            self.model, self.path, nn.CrossEntropyLoss(), self.data, integral_eps=eps, early_integral_eps=eps, device="cpu",
            evaluate_predictions=False, kernel_store_interval=10**9, keep_param_wise_kernel=True,
            param_wise_kernel_keep_out_dims=True,
        )  # fmt: skip
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            rebuilt, _, kernel, _, kept = peer.predict(x, keep_kernel_matrices=matrix)
        scores = torch.cat([part[:, :, 0] for part in kept["param_kernel"].values()], -1)
        data = sum(part[:, 0] for part in kernel.values()).permute(2, 0, 1) if matrix else None
        return rebuilt.detach(), scores, data


def network() -> nn.Module:
    torch.manual_seed(SEED)
    return nn.Sequential(digits_cnn(), nn.LogSoftmax(-1))  # explaind explains what the module returns


def train(case: Case, steps: int, x: Tensor, y: Tensor, folder: Path | None, peer: bool) -> tuple[nn.Module, Peer | None]:
    """Trains once; records with prunekit where there is a ``folder``, and with explaind if ``peer``: the same weights."""
    model = network()
    wrapped = Peer(case, model, x, y) if peer else None
    optimizer = wrapped.path.optimizer if wrapped else case.optimizer(model.parameters(), **case.options)
    recorder = Recorder(folder, model, optimizer, second_moments=case.adaptive) if folder else None
    generator = torch.Generator().manual_seed(SEED)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(1 + steps * BATCH // len(x))])
    with recorder or contextlib.nullcontext():
        for indices in order.split(BATCH)[:steps]:
            optimizer.zero_grad()
            F.nll_loss(model(x[indices]), y[indices]).backward()
            if recorder:
                recorder.batch(indices)
            optimizer.step()
            if wrapped:
                wrapped.after_step(x[indices], y[indices], indices)
    return model, wrapped


class Ours:
    """prunekit on one recorded run."""

    def __init__(self, folder: Path, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.trajectory = Trajectory(folder)
        self.x, self.y = x, y
        self.evaluations = 0  # counted here, rejected midpoints included, whatever the report says
        self.function = ModelFunction(model, self.trajectory.layout, self.trajectory.fixed)
        inner = self.function.directional

        def counted(theta: Tensor, direction: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            self.evaluations += len(x)
            return inner(theta, direction, x, y)

        self.function.directional = counted  # type: ignore[method-assign]

    def parameters(self, x: Tensor, y: Tensor, nodes: int) -> Tensor:
        """``(samples, outputs, P)``; an output split into chunks would need more memory than these few samples take."""
        names = [entry.name for entry in self.trajectory.layout.parameters]
        parts = attribute(self.function, self.trajectory.segments, x, y, nodes=nodes)
        return torch.cat([torch.cat([part.scores[name].flatten(2) for name in names], -1) for part in parts])

    def importances(self, x: Tensor, y: Tensor) -> Tensor:
        """``Σ_x Σ_c |ψ|`` with one midpoint a step, ``(P,)``."""
        return sum(
            torch.cat([score.abs().sum((0, 1)).flatten() for score in part.scores.values()])
            for part in attribute(self.function, self.trajectory.segments, x, y)
        )  # type: ignore[return-value]

    def data(self, x: Tensor, y: Tensor, nodes: int) -> Tensor:
        """``(training samples, samples, outputs)``; cross-entropy on log-probabilities is their negative likelihood."""
        batch = lambda indices: (self.x[indices], self.y[indices])  # noqa: E731
        return data_scores(self.function, self.trajectory, x, y, batch, nodes=nodes).scores

    def rebuilt(self, x: Tensor, y: Tensor, nodes: int | None) -> tuple[Tensor, float]:
        """Outputs ``(samples, outputs)`` and evaluations per step and sample; without ``nodes`` by tolerance."""
        before = self.evaluations
        segments = self.trajectory.segments()
        found = reconstruct(self.function, segments, x, y, nodes=nodes or 1, tolerance=TOLERANCE if nodes is None else None)
        return found.rebuilt, (self.evaluations - before) / len(x) / len(self.trajectory)


# -- the comparisons --------------------------------------------------------------------------------------------------


def row(what: str, theirs: float, ours: float, unit: str) -> None:
    print(f"  {what:44s} explaind {theirs:10.4g}   prunekit {ours:10.4g} {unit:14s} ratio {theirs / ours:8.2f}", flush=True)


def compare(case: Case, options: argparse.Namespace, goals: Goals) -> None:
    quick: bool = options.quick
    steps = case.steps[quick]
    splits = digits(**SPLITS)
    x, y = (t[: TRAIN[0]] for t in splits["train"])
    with tempfile.TemporaryDirectory() as folder:
        note(f"{case.name}: {steps} steps of training, recorded by both")
        model, peer = train(case, steps, x, y, Path(folder) / "path", peer=True)
        assert peer is not None
        ours = Ours(Path(folder) / "path", model, x, y)
        with torch.no_grad():
            accuracy = float((model(splits["test"][0]).argmax(1) == splits["test"][1]).float().mean())
        settings = ", ".join(f"{k} {v:g}" for k, v in case.options.items())
        print(f"\n{case.name}, {settings}, {steps} steps of {BATCH} on {len(x)} samples; test accuracy {accuracy:.1%}")
        final = peer.model.model.state_dict()
        assert all(torch.equal(final[k], v) for k, v in ours.trajectory.model_state().items()), "not the same weights"
        coarse = same_nodes(peer, ours, splits["scoring"], options, goals)
        converged(case, peer, ours, splits["scoring"], options, goals, coarse)


def same_nodes(
    peer: Peer, ours: Ours, scoring: tuple[Tensor, Tensor], options: argparse.Namespace, goals: Goals
) -> tuple[int, float]:
    """Goal 1. Returns sample-nodes per step and processor seconds of explaind's run."""
    n, nodes = options.samples, options.nodes
    x, y = scoring[0][:n], scoring[1][:n]
    note(f"explaind, {n} samples, {nodes} nodes, everything at once")
    (rebuilt, scores, data), cost = timed(lambda: peer.explain(x, nodes, matrix=True))
    assert data is not None
    note("prunekit, the same: parameters, data, reconstruction")
    mine, by_parameter = timed(lambda: ours.parameters(x, y, nodes))
    mine_data, by_data = timed(lambda: ours.data(x, y, nodes))
    (mine_rebuilt, _), rebuilding = timed(lambda: ours.rebuilt(x, y, nodes))
    target = ours.function(ours.trajectory.state(-1), x, y)
    print(f" Same {nodes} nodes a step; {n} samples x {CLASSES} outputs")
    parts = (by_parameter, by_data, rebuilding)
    row("time, all three (explaind: one run)", cost.processor, sum(p.processor for p in parts), "processor s")
    row("  on the clock", cost.clock, sum(p.clock for p in parts), "s")
    print(f"  {'  of which':44s} {'':34s}{', '.join(f'{p.processor:.3g}' for p in parts)} s: parameters, data, reconstruction")
    row("mean reconstruction error", float((rebuilt - target).abs().mean()), float((mine_rebuilt - target).abs().mean()), "")
    goals.at_most("1, parameter-wise ||difference|| / ||explaind||", float((mine - scores).norm() / scores.norm()), 1e-4)
    data = (data / BATCH).double()
    pair = torch.stack([data.flatten(), mine_data.double().flatten()])
    goals.at_least("1, data-wise correlation, samples x outputs", float(torch.corrcoef(pair)[0, 1]), 0.99999)
    columns = torch.stack([data.flatten(1), mine_data.double().flatten(1)]).sub(0)
    columns = columns - columns.mean(1, keepdim=True)
    lowest = (columns[0] * columns[1]).sum(0) / (columns[0].norm(dim=0) * columns[1].norm(dim=0))
    print(f"    lowest for one sample and output: {float(lowest.min()):.7f}; ", end="")
    print(f"||difference|| / ||explaind||: {float((mine_data - data).norm() / data.norm()):.2e}")
    return n * nodes, cost.processor


def converged(
    case: Case,
    peer: Peer,
    ours: Ours,
    scoring: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    goals: Goals,
    coarse: tuple[int, float],
) -> None:
    """Goals 2 (SGD) and 3."""
    n, nodes, judged = options.fine_samples, options.fine_nodes, not options.quick
    x, y = scoring[0][:n], scoring[1][:n]
    note(f"explaind, {n} samples, {nodes} nodes: the long one")
    (rebuilt, scores, _), cost = timed(lambda: peer.explain(x, nodes, matrix=False))
    # Two runs of different size tell its gradients from its buffers; the gradients are what more nodes cost.
    gradients = (cost.processor - coarse[1]) * n * nodes / (n * nodes - coarse[0])
    target = ours.function(ours.trajectory.state(-1), x, y)
    error = float((rebuilt - target).abs().mean())
    print(f" explaind's {nodes}-node run; {n} samples x {CLASSES} outputs, all steps, run in full, nothing extrapolated")
    print(f"  {cost.processor:.1f} processor s ({cost.clock:.1f} on the clock), about {gradients:.1f} of them for test gradients")
    if not case.adaptive:
        (mine, evaluations), spent = timed(lambda: ours.rebuilt(x, y, None))
        print(f" Reconstruction by tolerance ({TOLERANCE:g}) against it")
        row("mean reconstruction error", error, float((mine - target).abs().mean()), "")
        row("gradient evaluations per step and sample", nodes, evaluations, "")
        row("time", cost.processor, spent.processor, "processor s")
        goals.at_most("2, reconstruction error", float((mine - target).abs().mean()), error, judged)
        goals.at_most("2, evaluations per step and sample", evaluations, 20, judged)
        goals.at_least("2, times less time", cost.processor / spent.processor, 10, judged)
        print(f"    counting only explaind's test gradients: {gradients / spent.processor:.1f} times")
    mine, spent = timed(lambda: ours.importances(x, y))
    print(" Importances from one midpoint a step against it")
    row("time", cost.processor, spent.processor, "processor s")
    goals.at_least("3, Spearman", float(spearmanr(mine.numpy(), scores.abs().sum((0, 1)).numpy()).statistic), 0.999)
    goals.at_least("3, times less time", cost.processor / spent.processor, 100, judged)
    print(f"    counting only explaind's test gradients: {gradients / spent.processor:.1f} times")


# -- memory: each in a process of its own -----------------------------------------------------------------------------


def peak() -> float:
    """MB. VmHWM and not ru_maxrss, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def child(who: str, samples: int, steps: int) -> None:
    """Trains, then parameter- and data-wise scores of 8 samples, one node; prints MB before and at the peak."""
    splits = digits(**SPLITS)
    x, y = (t[:samples] for t in splits["train"])
    xs, ys = (t[:8] for t in splits["scoring"])
    network()(x[:BATCH]).sum().backward()
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        path = None if who == "explaind" else Path(folder) / "path"
        model, peer = train(CASES[0], steps, x, y, path, peer=who == "explaind")
        if peer:
            peer.explain(xs, 1, matrix=True)
        else:
            assert path is not None
            ours = Ours(path, model, x, y)
            ours.importances(xs, ys)
            ours.data(xs, ys, 1)
    print(json.dumps({"before": before, "peak": peak()}))


def memory(options: argparse.Namespace, goals: Goals) -> None:
    """Goal 4."""
    steps = 10 if options.quick else 40
    # freed tensors go back to the system at once, for both: the peak is what is held, not what the allocator kept
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    found: dict[tuple[str, int], dict[str, float]] = {}
    for who in ("explaind", "prunekit"):
        for samples in TRAIN:
            note(f"memory of {who} with {samples} training samples")
            command = [sys.executable, __file__, "--child", who, str(samples), str(steps)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
            found[who, samples] = json.loads(printed.splitlines()[-1])
    print(f"\nMemory, a process each: SGD, {steps} steps, parameter- and data-wise scores of 8 samples x {CLASSES} outputs")
    for samples in TRAIN:
        theirs, ours = found["explaind", samples], found["prunekit", samples]
        row(f"peak, {samples} training samples", theirs["peak"], ours["peak"], "MB")
        row("  above what it took to start", theirs["peak"] - theirs["before"], ours["peak"] - ours["before"], "MB")
    growth = {who: found[who, TRAIN[1]]["peak"] - found[who, TRAIN[0]]["peak"] for who in ("explaind", "prunekit")}
    print(f"  growth from {TRAIN[0]} to {TRAIN[1]} training samples: explaind {growth['explaind']:.1f} MB, ", end="")
    print(f"prunekit {growth['prunekit']:.1f} MB")
    goals.at_most("4, growth in MB", growth["prunekit"], 10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of about a minute; goals 2 and 3 need the full one")
    parser.add_argument("--samples", type=int, default=8, help="for the comparison with the same nodes")
    parser.add_argument("--nodes", type=int, default=5, help="of that comparison")
    parser.add_argument("--fine-samples", type=int, default=4, help="for explaind's 100-node run")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.fine_nodes = 20 if options.quick else 100
    if options.quick:
        options.samples, options.fine_samples = 4, 2
    if importlib.util.find_spec("explaind") is None or importlib.util.find_spec("tqdm") is None:
        print(INSTALL, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if options.child:
        child(options.child[0], int(options.child[1]), int(options.child[2]))
        return 0
    started = time.perf_counter()
    print(machine())
    goals = Goals()
    for case in CASES:
        compare(case, options, goals)
    memory(options, goals)
    print(f"\n{time.perf_counter() - started:.0f} s; ", end="")
    print(f"{len(goals.missed)} goals missed: {'; '.join(goals.missed)}" if goals.missed else "no goal missed")
    return 1 if goals.missed else 0


if __name__ == "__main__":
    sys.exit(main())
