"""state-dict: the pruned model's tensors in one safetensors file, and what rebuilds the model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit import batch, checkpoint
from prunekit.apply.manifest import MODEL, write_weights
from prunekit.errors import ArtifactError
from prunekit.exporting.same import answered, compare
from prunekit.exporting.subject import Format, Subject, Written
from prunekit.trajectory import load_into
from prunekit.trajectory.copies import copied


def write(subject: Subject, folder: Path) -> Written:
    """Writes both files, and compares a model of the file's tensors alone."""
    manifest = subject.known_plan("state-dict")
    path = folder / MODEL
    manifest = replace(manifest, files={MODEL: write_weights(subject.model, manifest, path)})
    manifest.save(folder / "prunekit.json")
    state = checkpoint.read_tensors(path)
    state |= {alias: state[name] for alias, name in manifest.aliases.items()}
    check_tensors(state, subject.model, path)
    loads = "safetensors.torch.load_file, or prunekit.load with the dense model's factory"
    if subject.inputs is None:
        return Written(loads)
    back = copied(subject.model)
    with torch.no_grad():
        for tensor in back.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    load_into(back, state, path)
    off = compare(answered(back, subject.inputs), answered(subject.model, subject.inputs), 0.0, f"{MODEL}, read back")
    return Written(loads, 0.0, off, [batch.size(subject.inputs)])


def check_tensors(found: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raises ArtifactError where tensors that were read back are not the model's: names, types, shapes, numbers."""
    for name, tensor in model.state_dict().items():
        if name not in found or found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor.cpu()):
            raise ArtifactError(f"{path.name}: {name} is not what was written, once read back; the disk may be failing")


FORMAT = Format(write, "model.safetensors, with prunekit.json")
