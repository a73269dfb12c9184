"""A model as one program of torch (``torch.export``): tensors in by name, tensors out, any number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import batch
from prunekit.batch import Inputs
from prunekit.errors import UsageError, quoted
from prunekit.measure.undisturbed import undisturbed

BATCH, SEQUENCE = "batch", "sequence"


class Answers(nn.Module):
    """A model that is called with the tensors of its inputs, and gives every tensor of its answer (``prunekit.batch.answers``).

    Args:
        model: what it calls.
        inputs: how the model is called; what is no tensor in it stays as it is.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        waiting = iter(tensors)
        return tuple(batch.answers(batch.called(self.model, batch.mapped(self._inputs, lambda _: next(waiting)))))


def names(inputs: Inputs) -> list[str]:
    """What the inputs' tensors are called in a program: their paths, ``input`` for a tensor alone."""
    found = [name.replace(".", "_") for name in batch.named(inputs)]
    return [f"input_{name}".rstrip("_") if not name or name[0].isdecimal() else name for name in found]


def several(inputs: Inputs) -> Inputs:
    """The inputs with two samples at least: of one, torch takes the number to be fixed."""
    return inputs if batch.size(inputs) > 1 else batch.joined([inputs, inputs])


def others(inputs: Inputs, axes: list[list[str | int]], samples: int) -> Inputs:
    """Inputs that no program was made with: other samples, so many, shorter sequences where these are free.

    Each is one of ``inputs`` turned around along its last axis, so that whatever it holds (tokens, masks) stays possible.
    """
    count = batch.size(inputs)
    waiting = iter(axes)

    def other(tensor: Tensor) -> Tensor:
        free = next(waiting)
        if BATCH not in free:
            return tensor
        found = tensor[torch.arange(samples) % count]
        if SEQUENCE in free and found.shape[1] > 2:
            found = found[:, : found.shape[1] - 1]
        return found.flip(-1) if found.dim() > 1 else found

    return batch.mapped(inputs, other)


def checked_sizes(inputs: Inputs) -> list[int]:
    """Numbers of samples that a program is checked with: one, and two others than it was made with."""
    count = batch.size(inputs)
    return [1, count + 1, 2 * count + 1]


def exported(model: nn.Module, inputs: Inputs) -> tuple[torch.export.ExportedProgram, list[list[str | int]]]:
    """The model's program, and of each input's axes the size, or what it is free in.

    The first axis of a tensor that has as many samples as the batch is free, and the second of whole numbers (tokens, masks).

    Raises:
        UsageError: torch cannot make a program of the model, or its code fixes the number of samples.
    """
    tensors, count = batch.leaves(inputs), batch.size(inputs)
    auto = torch.export.Dim.AUTO
    shapes = tuple(
        {axis: auto for axis in range(min(tensor.dim(), 2)) if axis == 0 or not tensor.is_floating_point()}
        if tensor.dim() and len(tensor) == count
        else None
        for tensor in tensors
    )
    with undisturbed(model), without_cache(model), torch.no_grad():
        try:
            program = torch.export.export(
                Answers(model, inputs), tuple(tensors), dynamic_shapes={"tensors": shapes}, strict=False
            )
        except Exception as error:  # whatever torch says of a user's model
            raise UsageError(
                f"torch.export makes no program of {type(model).__name__}, whose code decides by values ({quoted(error)}); "
                "export it to hf or state-dict"
            ) from error
        axes = [
            _axes(node.meta["val"]) for node in program.graph.nodes if node.op == "placeholder" and node.name in _users(program)
        ]
        if not _runs(program, inputs, axes):
            axes = [
                [size if free == SEQUENCE else free for free, size in zip(each, tensor.shape, strict=True)]
                for each, tensor in zip(axes, tensors, strict=True)
            ]
            if not _runs(program, inputs, axes):
                axes = []
    if not any(BATCH in free for free in axes):
        raise UsageError(
            f"{type(model).__name__} computes with {count} samples alone: its code fixes their number; let it take that from "
            "its inputs, or export to hf or state-dict"
        )
    return program, axes


def _runs(program: torch.export.ExportedProgram, inputs: Inputs, axes: list[list[str | int]]) -> bool:
    """Whether the program takes what ``axes`` says that it does: torch tells what a model's code fixes only then."""
    module = program.module()
    try:
        for samples in checked_sizes(inputs):
            module(*batch.leaves(others(inputs, axes, samples)))
    except Exception:  # torch's guards, or an operator that other shapes do not fit
        return False
    return True


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model keeps no keys and values for a next call inside: a program has no place for them."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not True:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def _users(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    return tuple(program.graph_signature.user_inputs)


def _axes(value: Tensor) -> list[str | int]:
    return [size if isinstance(size, int) else (BATCH, SEQUENCE)[min(axis, 1)] for axis, size in enumerate(value.shape)]
