"""Cats and dogs of CIFAR-10 (Krizhevsky 2009), from the binary archive that the user has."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import ArtifactError, UsageError

GET_IT = (
    "get https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (162 MB, md5 c32a1d4ab5d03f1284b67883e8d87530) and name it, or "
    "the folder it unpacks to, in the recipe (data.path) or in PRUNEKIT_DATA"
)
SIDE, IMAGE = 32, 3 * 32 * 32
RECORD = 1 + IMAGE  # a label, then the red, green and blue planes, row by row
CLASSES = {3: 0, 5: 1}  # cat, dog
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"


def cifar2(path: str | None = None, seed: int = 0, validation: int = 500, scoring: int = 500) -> dict[str, tuple[Tensor, Tensor]]:
    """Cats (0) against dogs (1), ``(samples, 3, 32, 32)``, each channel less its mean over its deviation in CIFAR-10.

    The archive's training images are for training, all 10,000; its 2,000 test images are dealt out to the other splits.

    Args:
        path: ``cifar-10-binary.tar.gz``, the folder that it unpacks to, or one that holds either; by default what
            PRUNEKIT_DATA names.
        seed: of the order in which test images are dealt out.
        validation, scoring: sizes; the rest is for testing.

    Raises:
        UsageError: no path, nothing there, the pickled python version, or sizes that leave no test images.
        ArtifactError: a file is truncated or is not CIFAR-10's.
    """
    given = path or os.environ.get("PRUNEKIT_DATA")
    if not given:
        raise UsageError(f"cifar2: where is CIFAR-10? {GET_IT}")
    place = Path(given)
    files = _files(place)
    parts = {name: _cats_and_dogs(content, f"{place}: {name}") for name, content in files}
    absent = [name for name in (*TRAIN, TEST) if name not in parts]
    if absent:
        raise ArtifactError(f"{place}: lacks {', '.join(absent)} of CIFAR-10's binary version; {GET_IT}")
    x, y = (torch.cat([parts[name][which] for name in TRAIN]) for which in (0, 1))
    test_x, test_y = parts[TEST]
    if min(validation, scoring) < 1 or validation + scoring >= len(test_x):
        raise UsageError(
            f"cifar2: validation {validation} and scoring {scoring} must be at least 1 each and leave test images; there are "
            f"{len(test_x)}"
        )
    order = torch.randperm(len(test_x), generator=torch.Generator().manual_seed(seed))
    sizes = [validation, scoring, len(test_x) - validation - scoring]
    held = zip(("validation", "scoring", "test"), order.split(sizes), strict=True)
    return {"train": (_normalised(x), y)} | {name: (_normalised(test_x[part]), test_y[part]) for name, part in held}


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the archive's binary files."""
    if place.is_dir():
        inside = place / "cifar-10-batches-bin"
        folder = inside if inside.is_dir() else place
        if (folder / TEST).is_file():
            yield from ((name, (folder / name).read_bytes()) for name in (*TRAIN, TEST) if (folder / name).is_file())
            return
        archive = place / "cifar-10-binary.tar.gz"
        if not archive.is_file():
            if any((place / name).exists() for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")):
                _refuse_pickles(place)
            raise UsageError(f"{place}: holds no CIFAR-10; {GET_IT}")
        place = archive
    elif not place.is_file():
        raise UsageError(f"{place}: no such file or folder; {GET_IT}")
    try:
        with tarfile.open(place) as tar:  # read in memory by name: nothing is unpacked
            for member in tar:
                name = Path(member.name).name
                if name == "data_batch_1":
                    _refuse_pickles(place)
                content = tar.extractfile(member) if member.isfile() and name in (*TRAIN, TEST) else None
                if content is not None:
                    yield name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ArtifactError(f"{place}: is not a whole tar archive ({str(error).splitlines()[0]}); {GET_IT}") from None


def _refuse_pickles(place: Path) -> None:
    raise UsageError(
        f"{place}: is the python version of CIFAR-10, which is pickled: reading a pickle runs whatever code it holds, so "
        f"prunekit reads the binary version, which is plain bytes; {GET_IT}"
    )


def _cats_and_dogs(content: bytes, source: str) -> tuple[Tensor, Tensor]:
    """Images ``(samples, 3, 32, 32)`` as bytes, and labels."""
    if not content or len(content) % RECORD:
        raise ArtifactError(f"{source} has {len(content):,} bytes, which is not a whole number of images of {RECORD:,}; {GET_IT}")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        raise ArtifactError(f"{source} holds label {labels.max()}, CIFAR-10 has 0 to 9; {GET_IT}")
    chosen = records[np.isin(labels, list(CLASSES))]
    images = torch.from_numpy(chosen[:, 1:].reshape(-1, 3, SIDE, SIDE).copy())
    return images, torch.tensor([CLASSES[label] for label in chosen[:, 0].tolist()], dtype=torch.int64)


def _normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation
