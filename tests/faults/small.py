"""The smallest run that has every artifact, made in a second: what is damaged, killed and compared here."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from prunekit import checkpoint
from tests.pictures import undrawn

RECIPE = """
seed: 3
threads: 1
model: {factory: "tests.faults.small:build", args: {}}
data: {factory: "tests.faults.small:data", args: {}}
train: {optimizer: {name: adamw, lr: 0.02}, epochs: 2, batch_size: 48, watch: {every: 1}, record: {snapshot_every: 1}}
score: {criteria: [influence, magnitude], samples: 8}
compare: {allocations: [global], sparsities: [0.5], structures: [unstructured]}
prune:
  - {name: loose, criterion: magnitude, sparsity: 0.5, structure: unstructured, refine: false}
  - {name: small, criterion: magnitude, sparsity: 0.5, structure: channels, refine: false}
eval: {samples: 8, nodes: 1, latency_batches: [1]}
"""
VOLATILE = ("cost", "seconds", "training_seconds", "latency", "machine", "peak_mb", "digest", "evaluation", "reused",
            "files", "path", "run", checkpoint.CHECKSUM)  # fmt: skip
"""Keys whose values differ between two runs of the same work, or prove those that do."""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def data() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """48 training samples, 16 of each other split."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator)
    y = x[:, :3].argmax(1)
    parts = {"train": slice(0, 48), "scoring": slice(48, 64), "validation": slice(64, 80), "test": slice(80, 96)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def save_pretrained(folder: Path) -> None:
    """A tiny classifier of text as transformers' ``save_pretrained`` writes it."""
    from benchmarks.zoo.operators import declare

    declare()
    import transformers

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


def words() -> dict[str, dict[str, torch.Tensor]]:
    """What that model reads: 48 training samples, 16 of each other split."""
    ids = torch.randint(4, 40, (96, 6), generator=torch.Generator().manual_seed(0))
    parts = {"train": slice(0, 48), "scoring": slice(48, 64), "validation": slice(64, 80), "test": slice(80, 96)}
    return {name: {"input_ids": ids[part], "labels": ids[part, 0] % 3} for name, part in parts.items()}


def prunekit(*arguments: object) -> int:
    """Calls the command line in this process; returns its exit code."""
    import sys

    from prunekit.cli import main

    before = sys.argv
    sys.argv = ["prunekit", *map(str, arguments)]
    try:
        with undrawn():
            main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        sys.argv = before
    return 0


def content(folder: Path) -> dict[str, str]:
    """File -> digest of what it says, without what differs between two runs of the same work; the lock and pictures by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            try:
                found[str(path.relative_to(folder))] = _digest(path, folder)
            except (ValueError, SafetensorError):
                found[str(path.relative_to(folder))] = "damaged"
    return found


def _digest(path: Path, folder: Path) -> str:
    if path.suffix == ".json":
        return _hash(_steady(json.loads(path.read_text().replace(str(folder), ""))))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(checkpoint.HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        proof = header.pop(checkpoint.TENSORS, None) and checkpoint.tensor_checksum(tensors)
        return _hash([_steady(header), proof or checkpoint.tensor_checksum(tensors)])
    if path.suffix == ".csv":
        return _hash([_steady(row) for row in csv.DictReader(path.read_text().replace(str(folder), "").splitlines())])
    if path.suffix in (".png", ".html") or path.name in (".lock", "README.md"):  # a model card has latencies
        return "there"
    return hashlib.sha256(path.read_bytes().replace(str(folder).encode(), b"")).hexdigest()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(inner) for key, inner in value.items() if key not in VOLATILE}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
