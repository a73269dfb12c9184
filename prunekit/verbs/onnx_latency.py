"""eval: how fast an ONNX export of the pruned model is, in turns with torch, where one lies in the pruned model's folder."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

from prunekit import batch
from prunekit.checkpoint import file_checksum
from prunekit.errors import ArtifactError, Note, theirs
from prunekit.explain import EvaluationRecord
from prunekit.explain.evaluation import InOnnx
from prunekit.exporting.onnx import FILE, session_of
from prunekit.exporting.program import Answers, without_cache
from prunekit.exporting.record import EXPORT, ExportRecord
from prunekit.measure import machine, timed
from prunekit.verbs.pruned_folder import open_pruned
from prunekit.verbs.run_folder import Run


def with_onnx(run: Run, record: EvaluationRecord, folder: Path) -> EvaluationRecord:
    """Adds the latency of the export in a folder inside ``folder`` to its ``eval.json``, once.

    Dense model, pruned model and export take turns on the processor, on the batches of ``eval.latency_batches``. An export of
    other weights than the pruned model's is left alone. Where onnxruntime is not installed, a note says so.

    Raises:
        ArtifactError: the export is not what was written there.
        UsageError: onnxruntime does not take it, or the run's batches.
    """
    found = _export_in(folder, record.made_from["weights"])
    if found is None or (record.onnx is not None and record.onnx["export"] == found[1].files[FILE]):
        return record
    place, export = found
    if importlib.util.find_spec("onnxruntime") is None:
        text = f"{place}: its latency is not measured, which needs onnxruntime; pip install 'prunekit[onnx]'"
        warnings.warn(text, Note, stacklevel=2)
        return record
    for name, proof in export.files.items():
        if file_checksum(place / name) != proof:
            raise ArtifactError(f"{place / name}: is not what the export wrote; export again with --overwrite")
    dense, pruned, test = run.model.cpu(), open_pruned(run, folder)[2], run.splits["test"]
    told: InOnnx = {"folder": place.name, "export": export.files[FILE], "machine": machine(), "batches": {}}
    for size in run.recipe.eval.latency_batches:
        x = test.batch([i % len(test) for i in range(size)])[0]
        models = {"dense": Answers(dense, x), "pruned": Answers(pruned, x), "onnx": session_of(place / FILE, x)}
        with theirs(f"{place / FILE}: a batch of {size}"), without_cache(dense), without_cache(pruned):
            timing = timed(models, batch.leaves(x), 1.0)
        over = timing.speedup("onnx", "pruned")
        told["batches"][str(size)] = {
            "dense_ms": timing.ms("dense").median, "torch_ms": timing.ms("pruned").median, "onnx_ms": timing.ms("onnx").median,
            "speedup": over.median, "low": over.low, "high": over.high,
        }  # fmt: skip
    whole = replace(record, onnx=told)
    whole.save(folder / "eval.json")
    return whole


def _export_in(folder: Path, weights: str) -> tuple[Path, ExportRecord] | None:
    """The ONNX export of these weights in one of the folder's own folders, by name the first."""
    for path in sorted(folder.glob(f"[!.]*/{EXPORT}")):
        export = ExportRecord.load(path)
        if export.to == "onnx" and export.made_from["weights"] == weights and FILE in export.files:
            return path.parent, export
    return None
