"""How much sooner two processes are done than one: influence, masks learnt, layers pruned, and what a step of learning sends.

    python benchmarks/distributed.py                        # 1 and 2 processes of one thread each, on the CPU
    python benchmarks/distributed.py --ranks 1 2 4 --rounds 5

Every team of processes is started once and holds the same models and samples; teams work turn by turn, so that what else the
machine does meets all of them alike. Ratios are of neighbouring turns, figures are medians. What is scored is influence along a
path of 21 digits CNNs, of 128 samples; what is learnt are the masks of a Llama with random weights, on which neither cost
depends; what is pruned layer by layer is the same Llama, by SparseGPT from 128 windows. Seconds of a processor are those of the
process that took most: where others use the cores, they say more than the clock.
A step sends ``2 (N - 1) / N`` times four bytes for every weight that may go, from each of N processes; what is sent is counted by
the system, as bytes that a process writes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from prunekit import Trajectory, make_plan, prune_layerwise, ranks, score
from prunekit.data import Samples
from prunekit.repair.streamed import Streaming, StreamLearning
from prunekit.repair.swaps import get_swaps
from prunekit.task import get_task
from prunekit.trajectory import Layout

SAMPLES, STATES = 128, 21
LLAMA = {"vocabulary": 512, "width": 256, "layers": 4, "heads": 8, "kv_heads": 2, "hidden": 688, "length": 128}
BATCH, STEPS = 32, 4
TASK = get_task("causal_lm")
Work = Callable[[], Any]


def scoring() -> Work:
    """Influence of a digits CNN at the end of a path."""
    from prunekit.models.digits import digits_cnn

    generator = torch.Generator().manual_seed(0)
    models = []
    for number in range(STATES):
        torch.manual_seed(0)
        models.append(digits_cnn().eval())
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter += 0.05 * number / STATES * torch.randn(parameter.shape, generator=generator)
    path = Trajectory.of(*models)
    x = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
    y = torch.randint(10, (SAMPLES,), generator=generator)
    return lambda: score(path, models[-1], list(zip(x.split(64), y.split(64), strict=True)), criterion="influence")


def learning() -> tuple[Work, int]:
    """Steps of learning from a stream, and how many weights may go."""
    from prunekit.models import llama

    torch.manual_seed(0)
    model = llama(**LLAMA).eval()
    tokens = torch.randint(LLAMA["vocabulary"], (BATCH * (STEPS + 4), LLAMA["length"]))
    samples = Samples.of([(tokens, tokens)], TASK.batch)
    left = ["*embed*"]  # the head is the same tensor
    plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude", ignore=left), model, sparsity=0.5)
    swaps = get_swaps(plan, Layout.of(model), torch.device("cpu"))
    how = Streaming(tokens=tokens.numel(), batch=BATCH)
    learner = StreamLearning(swaps, model, samples, samples.first(BATCH), how, task=TASK)
    stream = learner._stream.shared()
    learner.begin(stream)

    def steps() -> None:
        for _ in range(STEPS):
            learner.step(next(stream), 0.5)

    return steps, len(swaps.keep)


def by_layers() -> Work:
    """All layers of a Llama, with new weights."""
    from prunekit.models import llama

    torch.manual_seed(0)
    model = llama(**LLAMA).eval()
    tokens = torch.randint(LLAMA["vocabulary"], (SAMPLES, LLAMA["length"]))
    return lambda: prune_layerwise(model, [(tokens, None)], sparsity=0.5, task="unlabelled")


def written() -> int:
    """Bytes that this process has given to write calls, to sockets too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def member() -> None:
    """One process of a team: works as it is asked to, line by line, and the first one tells seconds and bytes."""
    torch.set_num_threads(1)
    with ranks.joined():
        makers: dict[str, Callable[[], tuple[Work, int]]] = {
            "score": lambda: (scoring(), 0), "learn": learning, "layers": lambda: (by_layers(), 0),
        }  # fmt: skip
        made: dict[str, tuple[Work, int]] = {}
        for line in sys.stdin:
            what = line.strip()
            if what not in made:
                made[what] = makers[what]()
            work, weights = made[what]
            ranks.wait()
            before, begun, busy = written(), time.perf_counter(), time.process_time()
            work()
            busiest = max(ranks.gathered(time.process_time() - busy))
            if ranks.first():
                print(time.perf_counter() - begun, busiest, written() - before, weights, flush=True)


class Team:
    """Some processes that have met."""

    def __init__(self, count: int) -> None:
        self._store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        told = {
            "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        self._members = [
            subprocess.Popen(
                [sys.executable, __file__, "--member"],
                env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def work(self, what: str) -> tuple[float, float, int, int]:
        """Seconds, those of the busiest processor, bytes that the first process sent, weights that may go."""
        for one in self._members:
            assert one.stdin is not None
            one.stdin.write(f"{what}\n")
            one.stdin.flush()
        assert self._members[0].stdout is not None
        told = self._members[0].stdout.readline().split()
        if not told:
            self.close()
            raise SystemExit(f"a team of {len(self._members)} has ended; what its processes said stands above")
        return float(told[0]), float(told[1]), int(told[2]), int(told[3])

    def close(self) -> None:
        for one in self._members:
            one.kill()
        for one in self._members:
            one.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="sizes of teams; the first is compared with")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every team")
    parser.add_argument("--work", nargs="+", choices=("score", "learn", "layers"), default=["score", "learn", "layers"])
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.member:
        member()
        return
    teams = {count: Team(count) for count in given.ranks}
    one = given.ranks[0]
    print("work   ranks  seconds  as fast  processor s  as fast  MB sent a step  formula")
    for what in given.work:
        turns: dict[int, list[tuple[float, float, int, int]]] = {count: [] for count in teams}
        for number in range(given.rounds + 1):
            for count, team in teams.items():
                found = team.work(what)
                if number:  # the first turn warms up
                    turns[count].append(found)
        for count, own in turns.items():
            line = f"{what:<6} {count:>5}"
            for place, width in ((0, 8), (1, 12)):
                ratio = statistics.median(a[place] / b[place] for a, b in zip(turns[one], own, strict=True))
                line += f" {statistics.median(turn[place] for turn in own):>{width}.2f} {ratio:>7.2f}×"
            if what == "learn":
                formula = 2 * (count - 1) / count * 4 * own[0][3]
                line += f" {statistics.median(turn[2] for turn in own) / STEPS / 1e6:>15.2f} {formula / 1e6:>8.2f}"
            print(line, flush=True)
    for team in teams.values():
        team.close()


if __name__ == "__main__":
    main()
