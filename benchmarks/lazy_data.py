"""Peak memory of score, compare, eval and refine over samples that are made when they are looked at: 1,000 to 100,000 of them.

    python benchmarks/lazy_data.py            # 1,000, 10,000 and 100,000
    python benchmarks/lazy_data.py 1000 5000

Every cell is a process of its own (``ru_maxrss``). Samples are 3 × 16 × 16 numbers, so 100,000 of them would take 293 MiB.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

VERBS = ("score", "compare", "eval", "refine")


class Made(Dataset[tuple[Tensor, int]]):
    """Sample ``i`` is drawn from seed ``i``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return x, int(x.mean() > 0)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
    )


def work(verb: str, count: int) -> None:
    """One cell; prints the peak in MiB."""
    from prunekit import Trajectory, make_plan, masked, refine, score
    from prunekit.data import Samples
    from prunekit.search.compare import compare
    from prunekit.task import Classification
    from prunekit.task.evaluation import References, evaluate
    from prunekit.trajectory.imported import write_checkpoints

    torch.set_num_threads(1)
    folder, model, data = Path(tempfile.mkdtemp()), build(), Made(count)
    save_file(model.state_dict(), folder / "m.safetensors")
    write_checkpoints(folder / "t", model, [folder / "m.safetensors"])
    trajectory = Trajectory(folder / "t")
    magnitude = score(trajectory, model, criterion="magnitude")
    plan = make_plan(magnitude, model, sparsity=0.5)
    task, samples = Classification(), Samples.of(data, Classification().batch)
    if verb == "score":
        score(trajectory, model, data, criterion="taylor", target="margin")
    elif verb == "compare":
        compare(model, {"magnitude": magnitude}, data, structures=["unstructured"], allocations=["global"], sparsities=[0.5])
    elif verb == "eval":
        evaluate(masked(model, plan), samples, task, References(model, samples, task)).figures()
    else:
        refine(plan, model, data, rounds=1, steps=10, nodes=2)
    print(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        work(given.cell[0], int(given.cell[1]))
        return
    print("peak MiB".ljust(10), *(f"{count:>10,}" for count in given.counts))
    for verb in VERBS:
        peaks = []
        for count in given.counts:
            done = subprocess.run(
                [sys.executable, __file__, "--cell", verb, str(count)], capture_output=True, text=True, check=True
            )
            peaks.append(int(done.stdout.split()[-1]))
        print(verb.ljust(10), *(f"{peak:>10,}" for peak in peaks), flush=True)


if __name__ == "__main__":
    main()
