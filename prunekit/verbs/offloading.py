"""compress --offload: a model pruned from its files into others, with one of its blocks in memory at a time."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.batch import to
from prunekit.blocks import InFiles
from prunekit.checkpoint import checksum, file_checksum
from prunekit.data import Samples, Split
from prunekit.errors import ArtifactError, PrunekitError, UsageError, quoted
from prunekit.exporting import ExportRecord, placed
from prunekit.exporting.card import table
from prunekit.exporting.companions import largest_shard
from prunekit.exporting.from_files import write_offloaded
from prunekit.exporting.placing import RUN
from prunekit.exporting.record import export_in
from prunekit.exporting.subject import Written
from prunekit.huggingface import Folder, load_model
from prunekit.imports import needed
from prunekit.layerwise import Asked, Pruning
from prunekit.progress import Bar, Stages
from prunekit.recipe import Layerwise, Prune, Recipe, check_device
from prunekit.task import Task
from prunekit.task.evaluation import Evaluation, compared, evaluate, run, told_of
from prunekit.verbs.checks import settled, told_on_itself, with_task
from prunekit.verbs.compress import check_apart
from prunekit.verbs.run_folder import load_splits
from prunekit.version import __version__

STAGES = ("read", "dense", "prune", "write", "pruned")
JUDGED = 256
"""Test samples that the dense and the pruned model are measured on at most: each reads the whole model once a batch."""
COMPARED = 2
"""Samples whose answers what was written must give exactly."""
MMAP_THRESHOLD, LARGE = -3, 2**20
"""M_MMAP_THRESHOLD of glibc's malloc.h, and bytes from which a tensor's memory is the system's again once it goes."""
OUTPUTS = 8
"""Outputs of a batch take this part of the bytes of activations at most, since measuring them takes some copies."""


def compress_offloaded(
    recipe: Recipe, folder: Path, out: Path, overwrite: bool = False, announce: Callable[[str], None] = print
) -> dict[str, Any]:
    """Prunes the model in ``folder`` layer by layer into ``out``, which ``from_pretrained`` loads.

    In memory are one block, the hidden states of the calibration samples up to their budget, and embeddings or the output layer
    while they compute. The blocks' pruned weights lie in files beside ``out`` meanwhile.

    Args:
        recipe: with one model to prune, by a layer-wise method.

    Returns:
        what export.json says of the pruning, and ``export``, ``model``, ``task``, ``samples``.

    Raises:
        UsageError: the model is no row of blocks, does not take the data, or its weights cannot be read layer by layer.
        ArtifactError: a file is damaged, the disk has too little room, or ``out`` holds something else.
        NonFiniteError: what reaches a layer is NaN or Inf.
    """
    _give_back()
    work = _Work(with_task(recipe), folder, announce)
    with Stages("compress", len(STAGES)) as stages:
        stages.begin(STAGES[0])
        made_from = work.made_from()
        record, reused = placed("hf", made_from, out, overwrite, lambda temporary: work.write(temporary, out, stages))
    return {
        **_told(record),
        "samples": {name: len(split) for name, split in work.splits.items()},
        "export": {**record.content(), "folder": str(out), "reused": reused},
    }


def _give_back() -> None:
    """Has glibc return what a tensor took to the system when it goes.

    Otherwise tensors of up to 32 MiB come from one heap, in whose holes the next block's do not fit: of forty blocks a gigabyte
    stayed.
    """
    library: Any = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, LARGE)


def check_offloaded(recipe: Recipe, given: Sequence[Path], folders: Sequence[Path], out: Path) -> None:
    """Refuses what cannot be right before anything long begins.

    Raises:
        UsageError, ArtifactError: as ``prunekit.verbs.compress.check_out``; or more is asked for than ``--offload`` does.
    """
    for package in ("transformers", "accelerate"):
        needed(package)
    (wanted,) = recipe.prune
    if wanted.layerwise is None:
        raise UsageError("--offload brings in a block at a time for --layerwise; name a method, such as --layerwise sparsegpt")
    if wanted.repair is not None:
        raise UsageError("--refine looks at the whole model at once, and --offload never has it; leave one of them out")
    if wanted.trains:
        raise UsageError("--finetune and --tune-tokens train the whole model, and --offload never has it; leave one of them out")
    if len(folders) > 1:
        raise UsageError(f"--offload takes one model's folder, not {len(folders)}; the last one of a path is what is pruned")
    check_apart(given, folders, out)
    with_task(recipe)
    export_in(out)
    if os.path.lexists(out / RUN):
        raise ArtifactError(f"{out / RUN}: is of a compress without --offload; choose another --out")


def _told(record: ExportRecord) -> Mapping[str, Any]:
    assert record.pruning is not None
    return record.pruning


@dataclass
class _Work:
    recipe: Recipe
    folder: Path
    announce: Callable[[str], None]
    splits: dict[str, Split] = field(init=False)

    def __post_init__(self) -> None:
        _ = Folder(self.folder).shards
        self.splits = load_splits(self.recipe, fetch=True)
        for note in told_on_itself(self.splits):
            self.announce(f"compress: {note}")

    @property
    def wanted(self) -> Prune:
        return self.recipe.prune[0]

    @property
    def layerwise(self) -> Layerwise:
        assert self.wanted.layerwise is not None
        return self.wanted.layerwise

    def made_from(self) -> dict[str, Any]:
        """What decides the pruned model."""
        files, shards = {}, Folder(self.folder).shards
        with Bar("compress: files are hashed", len(shards)) as bar:
            for path in shards:
                files[path.name] = file_checksum(path)
                bar.advance()
        return {
            "to": "hf",
            "weights": checksum({"config": Folder(self.folder).config_digest(), "files": files}),
            "plan": None,
            "evaluation": None,
            "layerwise": self.layerwise.model_dump(mode="json", exclude={"activations"}),
            "sparsity": self.wanted.sparsity,
            "structure": self.wanted.structure,
            "ignore": list(self.recipe.prunable.ignore),
            "train": self.splits["train"].digest(),
            "test": self.splits["test"].digest(),
        }

    def write(self, temporary: Path, out: Path, stages: Stages) -> Written:
        self._check_room(out)
        spare = temporary / ".weights"
        spare.mkdir()
        try:
            return self._pruned(temporary, spare, stages)
        finally:
            shutil.rmtree(spare, ignore_errors=True)

    def _check_room(self, out: Path) -> None:
        """Pruned blocks lie on the disk twice until the end."""
        needed = 2 * sum(path.stat().st_size for path in Folder(self.folder).shards)
        here = next(place for place in [out, *out.absolute().parents] if place.exists())
        if needed > (free := shutil.disk_usage(here).free):
            raise ArtifactError(
                f"{out}: pruning takes {needed / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free; choose another --out"
            )

    @torch.no_grad()
    def _pruned(self, temporary: Path, spare: Path, stages: Stages) -> Written:
        model = load_model(self.folder, self.recipe.model.auto, offload=spare)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        asked = Asked(
            sparsity=self.wanted.sparsity, structure=self.wanted.structure, ignore=self.recipe.prunable.ignore,
            include=self.recipe.prunable.include, **self.layerwise.options(),
        )  # fmt: skip
        home = InFiles(model, check_device(self.recipe.device), spare)
        task = self._task(model)
        data = self.splits["train"].samples().first(self.layerwise.samples)
        pruning = Pruning(model, asked, data, home, spill=spare)
        if not pruning.blocks:
            raise UsageError(
                f"{self.folder}: {type(model).__name__} is no row of blocks that hand their outputs on, and --offload brings in "
                "a block at a time; leave --offload out"
            )
        largest = max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in pruning.blocks)
        stages.begin("dense")
        judged = self._judged(model, task)
        dense = self._measured(model, judged, task)
        stages.begin("prune")
        kept = {name: int(solved.keep.sum()) for name, solved in pruning}
        stages.begin("write")
        inputs = self.splits["validation"].batch(range(min(COMPARED, len(self.splits["validation"]))))[0]

        def told(back: nn.Module) -> tuple[dict[str, Any], list[str], list[str]]:
            stages.begin("pruned")
            pruned = self._measured(back, judged, task)
            removed = sum(sizes[name] - count for name, count in kept.items())
            prunable = sum(sizes[name] for name in kept)
            found = {
                "model": type(model).__name__,
                "task": task.name,
                "prunekit": __version__,
                "torch": torch.__version__,
                "method": asked.method,
                "structure": asked.structure,
                "sparsity": asked.amount.sparsity,
                "achieved": {"prunable": removed / prunable, "all": removed / sum(sizes.values())},
                "parameters": {"total": sum(sizes.values()), "prunable": prunable, "removed": removed},
                "layers": {name: {"total": sizes[name], "kept": count} for name, count in kept.items()},
                "layerwise": pruning.facts(),
                "refused": pruning.refused,
                "largest_block_bytes": largest,
                "test_samples": len(judged),
                "measures": told_of(dense.measures),
                "dense": dense.figures(),
                "pruned": pruned.figures(),
                "lost": compared(pruned, dense),
            }
            return found, *_lines(found)

        shard = min(largest, largest_shard(self.folder) or largest)
        return write_offloaded(model, self.folder, temporary, shard, to(inputs, home.inputs), spare / "again", told)

    def _task(self, model: nn.Module) -> Task:
        """The task, once a sample has gone through the model: whatever does not fit is said before anything long."""
        self.recipe = settled(self.recipe, model, self.splits)
        task = self.recipe.load_task()
        x, y = self.splits["train"].batch(range(1))
        try:
            outputs = run(model, (x, None), task)
        except PrunekitError:
            raise
        except Exception as error:  # a model that uses weights outside of their layers, or other data than it takes
            raise UsageError(
                f"{self.folder}: {type(model).__name__} does not run on a sample with its weights read layer by layer "
                f"({quoted(error)}); leave --offload out"
            ) from error
        task.check(outputs, y, "train split")
        if not bool(torch.isfinite(outputs[outputs > -torch.inf]).all()):
            raise UsageError("data: the model's outputs on the train split hold NaN or Inf; so may its inputs")
        return task

    def _judged(self, model: nn.Module, task: Task) -> Samples:
        """Test samples, in batches whose outputs leave room."""
        some: Samples = self.splits["test"].samples().first(JUDGED)
        each = run(model, some.rows(0, 1), task).nbytes
        most = self.layerwise.options()["activations"] // OUTPUTS
        return some.bounded(max(1, min(JUDGED, most // each)))

    def _measured(self, model: nn.Module, samples: Samples, task: Task) -> Evaluation:
        with Bar("compress: test samples", len(samples)) as bar:
            return evaluate(model, samples, task, bar=bar)


def _lines(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """For the card: what was removed, and what that came to."""
    shares, facts = found["achieved"], found["layerwise"]
    removed = [
        f"- structure: {found['structure']}",
        f"- method: `{found['method']}`, layer by layer, from {facts['samples']:,} training samples",
        f"- removed: {100 * shares['prunable']:.2f} % of the prunable parameters, {100 * shares['all']:.2f} % of all",
    ]
    return removed, table(found["test_samples"], found["measures"], found["dense"], found["pruned"])
