"""Small archives in the format of CIFAR-10's binary version."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from prunekit.data.cifar import TEST, TRAIN

IMAGES = 60  # in the first file


def contents(seed: int = 0) -> dict[str, bytes]:
    """Every label from 0 to 9 in turn, random pixels; a different number of images in each file."""
    generator = np.random.default_rng(seed)
    files = {}
    for number, name in enumerate((*TRAIN, TEST)):
        labels = np.arange(IMAGES + number) % 10
        pixels = generator.integers(0, 256, (len(labels), 3072))
        files[name] = np.concatenate([labels[:, None], pixels], 1).astype(np.uint8).tobytes()
    return files


def pack(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-bin") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"readme.html": b"<p>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
