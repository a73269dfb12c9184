"""One of several processes that train a model together and record it, over gloo.

What each part ended with lies beside its trajectory, for ``test_several``.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it; here once, in the server that the processes are forked from
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from prunekit import PrunekitError, Recorder, durable
from prunekit.trajectory import together

STEPS, CUT = 9, 7
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


class Numbered(Dataset[tuple[int, Tensor, Tensor]]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, X[index], Y[index]


def plain(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 3))


def narrow() -> nn.Sequential:
    """Rows that do not divide, a layer of one row, a frozen one, running statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 3)
    )
    model[3].requires_grad_(False)
    return model


def sharded(mesh: Any = None) -> nn.Sequential:
    model = narrow()
    for layer in (model[0], model[3], model[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def adamw(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


def indices(step: int, rank: int) -> Tensor:
    """Five samples in one process, three in another."""
    return (torch.arange(3 + 2 * (rank == 0)) + step + 13 * rank) % 40


def whole(tensors: list[Tensor]) -> Tensor:
    return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t).detach().reshape(-1) for t in tensors])


def coordinates(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad] + [b for b in model.buffers() if b.is_floating_point()]


def steps(recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, stop: int = STEPS) -> Iterator[Tensor]:
    """Trains on from where the recorder stands; gives the whole state after every step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    with recorder:
        for step in range(recorder.steps, STEPS):
            if step == stop:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            where = indices(step, rank)
            F.cross_entropy(model(X[where]), Y[where]).backward()
            recorder.batch(where)
            optimizer.step()
            yield whole(coordinates(model))


def data_parallel(folder: Path, rank: int) -> None:
    """Unequal batches, two of them a step, dropout, clipping; the second time cut off and gone on with."""
    schedule: list[int] = []
    for name in ("ddp", "ddp-cut"):
        model = plain(0.3)
        torch.manual_seed(7 + rank)
        wrapped, optimizer = DistributedDataParallel(model), adamw(model)

        def loop(recorder: Recorder, stop: int, wrapped: Any = wrapped, optimizer: Any = optimizer) -> None:
            with recorder:
                for step in range(recorder.steps, STEPS):
                    if step == stop:
                        raise KeyboardInterrupt
                    optimizer.zero_grad()
                    for part in range(2):
                        where = indices(2 * step + part, rank)
                        with wrapped.no_sync() if part == 0 else nullcontext():
                            (F.cross_entropy(wrapped(X[where]), Y[where]) / 2).backward()
                        recorder.batch(where)
                    norm = nn.utils.clip_grad_norm_(wrapped.parameters(), 0.2)
                    recorder.gradient_scale(min(1.0, 0.2 / (float(norm) + 1e-6)))
                    optimizer.step()

        options: dict[str, Any] = {"second_moments": True, "snapshot_every": 3}
        if name == "ddp":
            loop(Recorder(folder / name, wrapped, optimizer, **options), -1)
        else:
            with suppress(KeyboardInterrupt):
                loop(Recorder(folder / name, wrapped, optimizer, **options), CUT)
            torch.manual_seed(99)
            recorder = Recorder.resume(folder / name, wrapped, optimizer)
            schedule.append(recorder.steps)
            loop(recorder, -1)
        torch.save(model.state_dict(), folder / f"{name}-{rank}.pt")
    assert schedule == [6]


def watched(folder: Path, rank: int) -> None:
    """A DistributedSampler's shards, under DDP and under fully_shard with gradients that are averaged every second batch."""
    for name in ("watched", "watched-sharded"):
        model: nn.Module = plain()
        if name == "watched":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model)
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
        sampler: Any = DistributedSampler(Numbered(), shuffle=True, seed=3)
        with Recorder(folder / name, model, optimizer) as recorder:
            loader = recorder.watch(DataLoader(Numbered(), 4, sampler=sampler))
            for epoch in range(2):
                sampler.set_epoch(epoch)
                for number, (where, x, y) in enumerate(loader):
                    last = number % 2 == 1 or number + 1 == len(loader)
                    several: Any = model
                    if name == "watched":
                        with nullcontext() if last else several.no_sync():
                            F.cross_entropy(model(x), y).backward()
                    else:
                        several.set_requires_gradient_sync(last)
                        F.cross_entropy(model(x), y).backward()
                    seen.append(where.tolist())
                    if last:
                        optimizer.step()
                        optimizer.zero_grad()
        (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))


def fully_sharded(folder: Path, rank: int) -> None:
    """Whole, every second state in half precision, replicated beside; the first compared with whole tensors by torch."""
    replicated = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    for name, mesh, options in (
        ("fsdp", None, {"second_moments": True}),
        ("half", None, {"states": "half", "every": 2}),
        ("replicated", replicated, {"second_moments": True}),
    ):
        model = sharded(mesh)
        optimizer = adamw(model)
        states, moments = [whole(coordinates(model))], []
        for state in steps(Recorder(folder / name, model, optimizer, **options), model, optimizer):  # type: ignore[arg-type]
            states.append(state)
            trained = [p for p in model.parameters() if p.requires_grad]
            moments.append(whole([optimizer.state[p]["exp_avg_sq"] for p in trained]))
            with torch.no_grad():
                model.eval()(X)  # which leaves whole parameters where shards were
                model.train()
        frozen = whole([model[3].weight, model[3].bias])
        if rank == 0:
            torch.save({"states": states, "moments": moments, "frozen": frozen}, folder / f"{name}.pt")


def set_between(folder: Path, rank: int) -> None:
    """Rows of one process alone are set between two steps, and by ``jump``; averaged weights end it."""
    model = sharded()
    optimizer = adamw(model)
    states = [whole(coordinates(model))]
    recorder = Recorder(folder / "set", model, optimizer)
    with recorder:
        for step in range(3):
            optimizer.zero_grad()
            where = indices(step, rank)
            F.cross_entropy(model(X[where]), Y[where]).backward()
            recorder.batch(where)
            with torch.no_grad():
                first: Any = model[0].weight
                if step == 1 and rank == 1:
                    first.to_local().fill_(0.25)
                if step == 2:
                    with recorder.jump():
                        if rank == 1:
                            first.to_local().fill_(0.5)
                    states.append(whole(coordinates(model)))
            if step == 1:
                states.append(whole(coordinates(model)))
            optimizer.step()
            states.append(whole(coordinates(model)))
        average = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() / 2 for name, p in model.named_parameters()}
        recorder.average(average)
    states.append(torch.cat([average[n].reshape(-1) for n, p in model.named_parameters() if p.requires_grad]))
    if rank == 0:
        torch.save(states, folder / "set.pt")


def cut_off(folder: Path, rank: int) -> None:
    for name in ("cut-same", "cut-fewer", "cut-twice"):
        model = sharded()
        optimizer = adamw(model)
        options: dict[str, Any] = {"second_moments": True, "snapshot_every": 2}
        with suppress(KeyboardInterrupt):
            list(steps(Recorder(folder / name, model, optimizer, **options), model, optimizer, CUT))
    model = sharded()
    optimizer = adamw(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3)
    recorder = Recorder.resume(folder / "cut-same", model, optimizer)
    assert recorder.steps == CUT - 1
    list(steps(recorder, model, optimizer))


def refusals(folder: Path, rank: int) -> None:
    """By name, what each process is told."""
    found: dict[str, str] = {}

    def told(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
            found[name] = ""
        except PrunekitError as error:
            found[name] = str(error)

    def begin(model: nn.Module, optimizer: Any, name: str = "refused", **options: Any) -> None:
        with Recorder(folder / name, model, optimizer, **options):
            pass

    model = plain()
    sgd: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    told("folders", lambda: begin(model, sgd, f"refused-{rank}"))
    told("options", lambda: begin(model, sgd, every=1 + rank))
    told("optimizers", lambda: begin(model, torch.optim.SGD(model.parameters(), lr=0.1 + rank)))
    told("zero", lambda: begin(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)))
    told("there", lambda: begin(model, sgd, "ddp"))
    told("one fails", lambda: begin(model, sgd, every=rank))
    other = plain()
    torch.nn.init.constant_(other[0].weight, float(rank))
    told("weights", lambda: begin(other, torch.optim.SGD(other.parameters(), lr=0.1)))
    mesh = init_device_mesh("cpu", (2,))
    columns = plain()
    columns[0].weight = nn.Parameter(distribute_tensor(columns[0].weight, mesh, [Shard(1)]))
    told("placement", lambda: begin(columns, torch.optim.SGD(columns.parameters(), lr=0.1)))
    partly = plain()
    fully_shard(partly[0])
    told("partly", lambda: begin(partly, torch.optim.SGD(partly.parameters(), lr=0.1)))

    def joined() -> None:
        wrapped = DistributedDataParallel(plain())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with Recorder(folder / "joined", wrapped, optimizer), wrapped.join():
            wrapped(X[:4]).sum().backward()
            optimizer.step()

    told("join", joined)

    def sampler() -> None:
        with Recorder(folder / f"alone-{rank}", model, sgd, alone=True) as recorder:
            shards: Any = DistributedSampler(Numbered())
            recorder.watch(DataLoader(Numbered(), 4, sampler=shards))

    told("sampler", sampler)

    def nan() -> None:
        inner = sharded()
        optimizer = adamw(inner)
        with Recorder(folder / "nan", inner, optimizer) as recorder:
            for _ in range(2):
                for p in inner.parameters():
                    p.grad = torch.full_like(p, float("nan") if rank == 1 else 0.0)
                optimizer.step()
            recorder.flush()

    told("nan", nan)
    (folder / f"refusals-{rank}.json").write_text(json.dumps(found))
    together._groups.clear()


def killed(folder: Path, rank: int) -> None:
    """The second process is killed in the middle of a write."""
    model = sharded()
    optimizer = adamw(model)
    written = 0

    def count(what: str, path: Path) -> None:
        nonlocal written
        written += path.name.startswith("states") and rank == 1
        if written == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.on_operation = count
    recorder = Recorder(folder / "killed", model, optimizer, second_moments=True, snapshot_every=2)
    with suppress(PrunekitError, RuntimeError):
        for _ in steps(recorder, model, optimizer):
            if rank == 1:
                recorder._tape.writer.flush()  # type: ignore[union-attr]


def go_on(folder: Path, rank: int) -> None:
    """With three processes what two of them left."""
    for name in ("killed", "cut-twice", "cut-one"):
        model = sharded()
        optimizer = adamw(model)
        recorder = Recorder.resume(folder / name, model, optimizer)
        before = recorder.steps
        states = [whole(coordinates(model))]
        stop = STEPS - 1 if name == "cut-twice" else STEPS
        with suppress(KeyboardInterrupt):
            states.extend(steps(recorder, model, optimizer, stop))
        if rank == 0:
            torch.save({"before": before, "states": states}, folder / f"{name}-on.pt")


def main(rank: int, size: int, port: int, what: str, folder: Path) -> None:
    """Process ``rank`` of ``size``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    if what == "two":
        for part in (data_parallel, watched, fully_sharded, set_between, cut_off, refusals, killed):
            part(folder, rank)
    else:
        go_on(folder, rank)
        dist.destroy_process_group()
