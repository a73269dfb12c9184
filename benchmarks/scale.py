"""The cost model of docs/scale.md: what it predicts beside what is measured here, and what it says of machines that are not here.

    python benchmarks/scale.py                 # 10⁵ to 10⁷ parameters, 1 and 2 processes of one thread; some minutes
    python benchmarks/scale.py --table         # 125 M to 70 B parameters on 1 to 64 GPUs, computed from their data sheet

Each job runs in processes of its own. Constants of the machine (``prunekit.cost.Machine``) are measured there with the same model
before the job and after it; memory is what the process holds at most beyond what it held before the model was made. Needs the
extra ``hf``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "0.1M": {"vocabulary": 256, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 172},
    "1M": {"vocabulary": 1024, "width": 160, "layers": 4, "heads": 5, "kv_heads": 5, "hidden": 432},
    "10M": {"vocabulary": 4096, "width": 320, "layers": 8, "heads": 10, "kv_heads": 2, "hidden": 896},
}
LENGTH = 64
SAMPLES, PIECES, BATCH, STEPS, ROUNDS, ACCEPT = 16, 8, 16, 20, 4, 16

GPU = {"forward": 0.4 * 989e12, "backward": 0.4 * 989e12, "sweep": 0.8 * 3.35e12, "read": 5e9, "wire": 300e9, "wait": 5e-5}
"""An H100 SXM by its data sheet (989 TFLOP/s in bfloat16, 3.35 TB/s, NVLink 450 GB/s a way), at shares that training reaches."""
BETWEEN = 40e9
"""Bytes a second of a GPU between machines of eight: one InfiniBand port of 400 Gbit/s each, at 80 %."""
LARGE: dict[str, dict[str, int]] = {
    "125 M": {"layers": 12, "width": 768, "hidden": 2048, "vocabulary": 50272, "heads": 12, "kv_heads": 12},
    "1 B": {"layers": 22, "width": 2048, "hidden": 5632, "vocabulary": 32000, "heads": 32, "kv_heads": 4},
    "7 B": {"layers": 32, "width": 4096, "hidden": 11008, "vocabulary": 32000, "heads": 32, "kv_heads": 32},
    "70 B": {"layers": 80, "width": 8192, "hidden": 28672, "vocabulary": 32000, "heads": 64, "kv_heads": 8},
}
ROOM = 80e9
"""Bytes of such a GPU."""


def rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


class Peak:
    """The most that this process holds while inside, looked at two hundred times a second."""

    def __enter__(self) -> Peak:
        self.most, self._on = rss(), True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while self._on:
            self.most = max(self.most, rss())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def job(name: str, size: str) -> dict[str, float]:
    """In a process of its own, one rank of several: predicted and measured."""
    import torch

    from prunekit import Recorder, Trajectory, cost, make_plan, ranks, refine, score
    from prunekit.data import Samples
    from prunekit.kernel import ModelFunction
    from prunekit.kernel.attribution import MEMORY
    from prunekit.models import llama
    from prunekit.repair.streamed import Streaming
    from prunekit.structure.prunable import prunable_parameters
    from prunekit.task import get_task
    from prunekit.trajectory import Layout
    from prunekit.trajectory.layout import fixed_state

    torch.set_num_threads(1)
    task = get_task("causal_lm")
    torch.manual_seed(0)
    small = llama(**SIZES["0.1M"], length=LENGTH, tied=False).eval()
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    task.loss.batch(task.outputs(small(tokens)), tokens).backward()
    cost.Shape.of(small, tokens, 0)  # what torch and transformers load on the way is none of the model's
    del small
    before = rss()
    model = llama(**SIZES[size], length=LENGTH, tied=False).eval()
    text = torch.randint(SIZES[size]["vocabulary"], (max(SAMPLES, BATCH * STEPS), LENGTH))
    every = Samples.of([(text, text)], task.batch)
    few = every.first(SAMPLES)
    x, y = every.rows(0, BATCH)
    left = ["*embed*", "*head*"]
    names = prunable_parameters(model, Layout.of(model), left, ())
    prunable = sum(p.numel() for n, p in model.named_parameters() if n in set(names))
    shape = cost.Shape.of(model, x, prunable)

    own = BATCH // ranks.size()

    def measured() -> cost.Machine:
        """This machine's rates, by a copy of the model that is gone afterwards."""
        layout = Layout.of(model)
        function = ModelFunction(model, layout, fixed_state(model, layout), "loss", task=task)
        theta = layout.state(model)

        def forward(samples: int) -> None:
            with torch.no_grad():
                function(theta, x[:samples], y[:samples])

        return cost.Machine.here(shape, forward, lambda n: function.gradient(theta, x[:n], y[:n]), own)

    def trained(steps: int, folder: Path | None = None) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with nullcontext() if folder is None else Recorder(folder, model, optimizer) as recorder:
            for number in range(steps):
                first = BATCH * number % len(text)
                inputs, labels = every.rows(first, first + BATCH)
                if recorder is not None:
                    recorder.batch(range(first, first + BATCH))
                optimizer.zero_grad()
                task.loss.batch(task.outputs(model(inputs)), labels).backward()
                optimizer.step()

    workers = ranks.size()
    with tempfile.TemporaryDirectory() as folder:
        first = measured()
        run: Callable[[], Any]
        if name == "score":
            with ranks.apart():
                trained(PIECES, Path(folder))
            model.eval()
            trajectory = Trajectory(folder)
            work = cost.score_path(shape, samples=SAMPLES, pieces=PIECES, memory=MEMORY, workers=workers)

            def run() -> Any:
                return score(trajectory, model, few, criterion="influence(target=loss)", task=task, ignore=left)
        elif name == "learn":
            plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude", ignore=left), model, sparsity=0.5)
            stream = Streaming(tokens=BATCH * STEPS * LENGTH, batch=BATCH, looks=2)
            work = cost.learn(shape, steps=STEPS, batch=BATCH, judged=ACCEPT, looks=2, workers=workers)

            def run() -> Any:
                return refine(plan, model, every, accept=every.first(ACCEPT), stream=stream, task=task)
        elif name == "refine":
            plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude", ignore=left), model, sparsity=0.5)
            work = cost.refine(shape, samples=SAMPLES, accept=ACCEPT, steps=STEPS, rounds=ROUNDS, workers=workers)

            def run() -> Any:
                return refine(plan, model, few, accept=every.first(ACCEPT), steps=STEPS, rounds=ROUNDS, patience=None, task=task)
        else:
            work = cost.counterfactual(shape, steps=STEPS, batch=BATCH)

            def run() -> Any:
                return trained(STEPS)

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the machine was measured with is none of the job's
        with Peak() as peak:
            ranks.wait()
            begun = time.perf_counter()
            run()
            spent = time.perf_counter() - begun
        machine = first.mean(measured())
    return {
        "predicted_s": work.seconds(shape, machine),
        "measured_s": spent,
        "predicted_mb": work.bytes / 1e6,
        "measured_mb": (peak.most - before) / 1e6,
        "parameters": shape.parameters,
    }


def middle(name: str, size: str, workers: int, rounds: int) -> dict[str, float]:
    """Of so many rounds, the one whose time is told with the median ratio."""
    found = sorted((started(name, size, workers) for _ in range(rounds)), key=lambda row: row["predicted_s"] / row["measured_s"])
    return found[rounds // 2]


def started(name: str, size: str, workers: int) -> dict[str, float]:
    """The job in so many processes of one thread; figures of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(workers),
    }
    call = [sys.executable, __file__, "--job", name, size]
    processes = [
        subprocess.Popen(call, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(workers)
    ]
    out = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name}, {size}, {workers} processes: failed")
    found: dict[str, float] = json.loads(out[0].strip().splitlines()[-1])
    return found


def table() -> None:
    """What learning, scoring along a path and refining take, computed."""
    from prunekit import cost

    print("| model | GPUs | learn 100 M tokens | bytes a GPU | score a path | refine | what breaks first |")
    print("|---|---|---|---|---|---|---|")
    for name, sizes in LARGE.items():
        length = 2048
        shape = cost.Shape.transformer(**sizes, length=length, number=2)
        for workers in (1, 8, 64):
            machine = cost.Machine(**{**GPU, "wire": GPU["wire"] if workers <= 8 else BETWEEN})
            batch = max(16, workers)
            steps = round(100e6 / (batch * length))
            learning = cost.learn(shape, steps=steps, batch=batch, judged=64, checkpointing=True, workers=workers)
            path = cost.score_path(shape, samples=256, pieces=100, memory=20e9, workers=workers)
            repair = cost.refine(shape, samples=256, accept=128, workers=workers)
            took = [_clock(one.seconds(shape, machine)) for one in (learning, path, repair)]
            broken = _breaks(shape, learning)
            print(f"| {name} | {workers} | {took[0]} | {learning.bytes / 1e9:,.0f} GB | {took[1]} | {took[2]} | {broken} |")


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _breaks(shape: Any, learning: Any) -> str:
    if 4 * shape.parameters > ROOM:
        return "the model itself: --layerwise with --offload is left"
    if learning.bytes > ROOM:
        return "the mask in work beside the model"
    if 3 * 4 * shape.parameters > 20e9:
        return "one sample's scores along the path"
    return "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--jobs", nargs="+", default=["score", "learn", "refine", "counterfactual"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1, help="of which the one with the median ratio of times is told")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.table:
        table()
        return
    if asked.job:
        from prunekit import ranks

        if ranks.asked():
            with ranks.joined():
                print(json.dumps(job(*asked.job)))
        else:
            print(json.dumps(job(*asked.job)))
        return
    print("| job | parameters | processes | seconds: predicted | measured | ratio | MB: predicted | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in asked.jobs:
        for size in asked.sizes:
            for workers in asked.processes if name != "counterfactual" else [1]:
                row = middle(name, size, workers, asked.rounds)
                print(
                    f"| {name} | {row['parameters']:,.0f} | {workers} | {row['predicted_s']:.2f} | {row['measured_s']:.2f} | "
                    f"{row['predicted_s'] / row['measured_s']:.2f} | {row['predicted_mb']:.0f} | {row['measured_mb']:.0f} | "
                    f"{row['predicted_mb'] / row['measured_mb']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
