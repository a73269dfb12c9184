"""onnx: the pruned model for onnxruntime and other runtimes, through torch's exporter, checked against torch."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import batch
from prunekit.batch import Inputs
from prunekit.errors import UsageError, quoted, theirs
from prunekit.exporting.program import BATCH, SEQUENCE, Answers, checked_sizes, exported, names, others, several, without_cache
from prunekit.exporting.same import answered, compare, rounding
from prunekit.exporting.subject import Format, Subject, Written
from prunekit.imports import needed
from prunekit.measure import timed
from prunekit.measure.undisturbed import placed

FILE = "model.onnx"
ONE_FILE = 1_500_000_000
"""Bytes of weights up to which they lie in the file itself, which holds two gigabytes at most."""


def write(subject: Subject, folder: Path) -> Written:
    """Writes ``model.onnx``, runs it by onnxruntime on other samples, and times both."""
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    needed("onnxscript")
    if any(parameter.dtype == torch.bfloat16 for parameter in subject.model.parameters()):
        raise UsageError("the model is bfloat16, which onnxruntime takes from no caller; prune it in float32 or float16 for onnx")
    inputs = placed(subject.model, several(subject.given_inputs("onnx")))
    program, axes = exported(subject.model, inputs)
    path = folder / FILE
    size = sum(t.numel() * t.element_size() for t in [*subject.model.parameters(), *subject.model.buffers()])
    try:
        with _silent():
            torch.onnx.export(
                program, (), path, dynamo=True, verbose=False, input_names=names(inputs), external_data=size > ONE_FILE
            )
        _name_axes(onnx, path, axes)
        session = _session(runtime, path)
    except Exception as error:  # torch's exporter, onnx and onnxruntime raise what they like
        raise UsageError(
            f"{type(subject.model).__name__} cannot become an ONNX file ({quoted(error)}); export it to torch-export, hf or "
            "state-dict"
        ) from error
    tolerance, worst, sizes = rounding(subject.model, 1e-4), 0.0, checked_sizes(inputs)
    program_of = Session(session, names(inputs))
    with without_cache(subject.model), torch.no_grad():
        for count in sizes:
            other = others(inputs, axes, count)
            found = program_of(*batch.leaves(other))
            worst = max(worst, compare(found, answered(subject.model, other), tolerance, f"{FILE}, with {count} samples"))
        speed = {}
        for count in subject.batches:
            timing = timed(
                {"dense": Answers(subject.model, inputs), "pruned": program_of}, batch.leaves(others(inputs, axes, count)), 1.0
            )
            speed[str(count)] = timing.speed("pruned", count)
    return Written(
        "onnxruntime.InferenceSession", tolerance, worst, sizes, axes=dict(zip(names(inputs), axes, strict=True)), speed=speed
    )


class Session(nn.Module):
    """A session of onnxruntime, called with tensors in the order of ``inputs``."""

    def __init__(self, session: Any, inputs: Sequence[str]) -> None:
        super().__init__()
        self.session, self.inputs = session, inputs
        self.known = {each.name for each in session.get_inputs()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {name: x.numpy() for name, x in zip(self.inputs, tensors, strict=True) if name in self.known}
        return tuple(torch.from_numpy(found) for found in self.session.run(None, given))


def session_of(path: Path, inputs: Inputs) -> Session:
    """An exported file in onnxruntime on the processor, with as many threads as torch has.

    Raises:
        UsageError: onnxruntime is not installed, or does not take the file.
    """
    runtime = needed("onnxruntime")
    with theirs(f"{path}: opening it with onnxruntime"):
        return Session(_session(runtime, path), names(inputs))


def _session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _name_axes(onnx: Any, path: Path, axes: Sequence[Sequence[str | int]]) -> None:
    """Calls the free axes batch and sequence, where torch's exporter numbers them."""
    model = onnx.load(path, load_external_data=False)
    named: dict[str, str] = {}
    for value, free in zip(model.graph.input, axes, strict=False):
        for each, name in zip(value.type.tensor_type.shape.dim, free, strict=True):
            if each.dim_param and name in (BATCH, SEQUENCE):
                named[each.dim_param] = str(name)
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for each in value.type.tensor_type.shape.dim:
            if each.dim_param:
                each.dim_param = _renamed(each.dim_param, named)
    path.write_bytes(model.SerializeToString())


def _renamed(text: str, named: Mapping[str, str]) -> str:
    """An axis may be a sum or a product of others."""
    return re.sub(r"\b\w+\b", lambda found: named.get(found[0], found[0]), text)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What torch's exporter says on its way is of no use to somebody who sees the check."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


FORMAT = Format(write, FILE)
