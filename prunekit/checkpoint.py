"""How tensors and facts reach the disk and come back: safetensors and JSON, each with its checksum, never pickle."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunekit import bounded, ranks
from prunekit.durable import replacing
from prunekit.errors import ArtifactError, Note, PrunekitError
from prunekit.remote import Place, Remote

HEADER = "prunekit"  # the one metadata key we write: one key keeps the file's bytes in a fixed order
CHECKSUM = "checksum"
"""Key of a JSON artifact, and of a header, that proves its content; see ``checksum``."""
TENSORS = "tensors"
"""Key of a header that proves the tensors beside it."""


@contextmanager
def reading(path: Place, kind: str) -> Iterator[None]:
    """Around code that takes an artifact's content apart: whatever is missing or of another type in it becomes one error.

    Raises:
        ArtifactError: names the file and what was looked for.
    """
    try:
        yield
    except PrunekitError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0] if str(error) else "empty"
        raise ArtifactError(f"{path}: not a whole {kind} ({what}); make it again") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as indented JSON with its checksum; NaN and Inf are refused, since JSON has neither."""
    write_text(path, json.dumps({**content, CHECKSUM: checksum(content)}, indent=2, allow_nan=False) + "\n")


def read_json(path: Place, kind: str | None = None) -> dict[str, Any]:
    """Reads an artifact of ``kind``, of any kind if None.

    Raises:
        ArtifactError: the file is missing, is not JSON, is another kind of artifact, or was changed after it was written.
    """
    content = bounded.read_json(path)
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or found is None or (kind is not None and found != kind):
        raise ArtifactError(f"{path}: expected an artifact of kind {kind or 'any of prunekit'!r}, found {found!r}")
    _prove(path, content)
    return content


def checksum(content: Mapping[str, Any]) -> str:
    """Proves a JSON file's content: XXH3 (128 bits) of its compact text, in the file's order.

    It tells what was damaged or changed by hand, in a time that nobody notices; it is no signature, since whoever writes the
    file can write the checksum as well.
    """
    return xxhash.xxh3_128_hexdigest(json.dumps(content, separators=(",", ":"), allow_nan=False).encode())


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors: names, types, shapes and bytes, in name order."""
    total = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(heading(name, tensor.dtype, tuple(tensor.shape)))
        total.update(raw(tensor))
    return total.hexdigest()


def file_checksum(path: Place) -> str:
    """The same of a file's bytes.

    Raises:
        ArtifactError: it cannot be read.
    """
    total = xxhash.xxh3_128()
    bounded.size(path)
    with bounded.opened(path) as file:
        while chunk := file.read(2**20):
            total.update(chunk)
    return total.hexdigest()


def agree(path: Place, found: str | None, written: Any, what: str = "was changed after it was written") -> None:
    """Compares what a file holds with what it, or the file that it belongs to, says that it holds.

    Raises:
        ArtifactError: they differ; names the file and both.
    """
    if found != written:
        raise ArtifactError(f"{path}: {what} (its checksum is {found}, it was written with {written}); make it again")


def _prove(path: Place, content: dict[str, Any]) -> None:
    """Takes the checksum out of ``content`` and compares; a file that is older than checksums is told of."""
    if CHECKSUM in content:
        written = content.pop(CHECKSUM)
        agree(path, checksum(content), written)
    elif "kind" in content:
        told(path)


def told(path: Place) -> None:
    """Says that a file is too old to be proved, once a folder."""
    text = f"{path.parent}: holds files of a prunekit without checksums; whether they were changed since cannot be told"
    warnings.warn(text, Note, stacklevel=2)


def metadata(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, str]:
    """A safetensors file's metadata: ``header`` as JSON, with the checksums that prove it and the tensors."""
    facts = {**header, TENSORS: tensor_checksum(tensors)}
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return {HEADER: json.dumps({**facts, CHECKSUM: checksum(json.loads(text))}, sort_keys=True, allow_nan=False)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Writes tensors as safetensors with ``header`` and checksums as JSON inside the file's metadata.

    Returns:
        the checksum that proves the whole file.
    """
    contiguous: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        found = tensor.detach().cpu().contiguous()
        storage = found.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != found.nbytes:
            found = found.clone()  # the format refuses tensors that share memory
        taken.add(found.untyped_storage().data_ptr())
        contiguous[name] = found
    facts = metadata(contiguous, header)
    with replacing(path) as temporary:
        if not ranks.first():  # whose file nobody reads
            return str(json.loads(facts[HEADER])[CHECKSUM])
        try:
            save_file(contiguous, temporary, metadata=facts)
        except SafetensorError as error:
            raise ArtifactError(f"{path}: could not be written ({error})") from error
        except KeyError as error:  # a type that the format has no name for
            name = next((name for name, tensor in contiguous.items() if tensor.dtype == error.args[0]), "a tensor")
            raise ArtifactError(f"{path}: {name} is {error.args[0]}, which safetensors cannot hold") from None
    return str(json.loads(facts[HEADER])[CHECKSUM])


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may hold what is no text


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as comma-separated values under a line of ``columns``; what a row holds beside them is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_tensors(path: Place, changed: bool = False) -> dict[str, Tensor]:
    """Reads every tensor of a safetensors file.

    Args:
        changed: whether its tensors may have been changed since, as a plan's decisions may.

    Raises:
        ArtifactError: the file is missing, truncated, not safetensors, or was changed after it was written.
    """
    with _opened(path) as file:
        header = _header_of(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if TENSORS in header and not changed:
        agree(path, tensor_checksum(tensors), header[TENSORS])
    return tensors


def read_header(path: Place, kind: str | None = None) -> dict[str, Any]:
    """Reads what prunekit wrote into a safetensors file's metadata; ``{}`` for a file from elsewhere.

    Raises:
        ArtifactError: the file cannot be read, it is not of ``kind``, or its header was changed after it was written.
    """
    with _opened(path) as file:
        header = _header_of(path, file.metadata())
    if kind is not None and header.get("kind") != kind:
        raise ArtifactError(f"{path}: expected an artifact of kind {kind!r}, found {header.get('kind')!r}")
    return header


def read_checksum(path: Place) -> str | None:
    """The checksum that a safetensors file says proves it; None for a file without."""
    with _opened(path) as file:
        found = _parsed(path, file.metadata()).get(CHECKSUM)
    return None if found is None else str(found)


def _header_of(path: Place, found: Mapping[str, str] | None) -> dict[str, Any]:
    header = _parsed(path, found)
    _prove(path, header)
    return header


def _parsed(path: Place, found: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        header = bounded.parsed((found or {}).get(HEADER, "{}"))
    except ValueError as error:
        raise ArtifactError(f"{path}: its prunekit metadata is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: its prunekit metadata is no mapping")
    return header


@contextmanager
def _opened(path: Place) -> Iterator[Any]:
    bounded.check_header(path)
    try:
        if isinstance(path, Remote):
            from prunekit.tensors_in_file import RangedFile

            with bounded.opened(path) as stream:
                yield RangedFile(stream, bounded.size(path))
            return
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a whole safetensors file ({error}); prunekit reads no other format and never unpickles, "
            "convert with safetensors.torch.save_file(state_dict, path)"
        ) from None


def digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> str:
    """SHA-256 (first 32 hex digits) over names, types, shapes and bytes, in name order, and over ``facts``."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(heading(name, tensor.dtype, tuple(tensor.shape)))
        total.update(raw(tensor))
    if facts is not None:
        total.update(json.dumps(facts, sort_keys=True, allow_nan=False).encode())
    return total.hexdigest()[:32]


def heading(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What ``digest`` hashes before a tensor's own bytes."""
    return f"{name}|{dtype}|{shape}|".encode()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def unique_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits a state dict into tensors stored once and ``alias -> name`` for the tied rest.

    Raises:
        ArtifactError: a module keeps something else than tensors there (``get_extra_state``).
    """
    kept: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"{name} is a {type(tensor).__name__} in the model's state, and files hold tensors alone")
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and not tensor.is_meta and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor
    return kept, aliases
