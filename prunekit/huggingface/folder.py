"""What lies in a model's folder: config.json, and weights in safetensors files, looked at without transformers.

Nothing of it is code: whatever would have transformers run some, or fetch some, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prunekit import bounded, checkpoint
from prunekit.errors import ArtifactError, quoted

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OTHERS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
"""Weights in other formats."""
PASSING = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
"""Keys of a config that decide nothing of a model's functions and shapes."""


@dataclass(frozen=True)
class Folder:
    """A folder that ``save_pretrained`` wrote."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            ArtifactError: there is none, it is no JSON mapping, or it asks for code or formats that are not taken.
        """
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "no such folder"
            raise ArtifactError(f"{self.path}: {what}; name a folder with {CONFIG} and {WEIGHTS}")
        place = self.path / CONFIG
        if not place.exists():
            raise ArtifactError(f"{self.path}: {self._without_config()}")
        found = bounded.mapping(place)
        if "quantization_config" in found and found["quantization_config"] is not None:
            raise ArtifactError(f"{place}: the weights are quantised (quantization_config); load weights that are not")
        for key, value in _settings(found):
            if "_implementation" in key and isinstance(value, str) and "/" in value:
                raise ArtifactError(f"{place}: {key} is {value!r}, code that would be fetched; remove that key")
        return found

    @property
    def architecture(self) -> str | None:
        """The class that config.json names; None where it names none, or several.

        Raises:
            ArtifactError: ``architectures`` is no list of names.
        """
        named = self.config.get("architectures") or []
        if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise ArtifactError(f"{self.path / CONFIG}: architectures is {named!r:.80}; it must be a list of one class's name")
        return named[0] if len(named) == 1 else None

    def config_digest(self) -> str:
        """A hash of what in config.json decides the model's function."""
        return checkpoint.digest({}, {key: value for key, value in self.config.items() if key not in PASSING})

    @cached_property
    def shards(self) -> tuple[Path, ...]:
        """The files that hold the weights: one, or those that the index names; each header is read.

        Raises:
            ArtifactError: there is none, one is missing or damaged, or the index names a tensor that its file lacks.
        """
        _ = self.config
        single = self.path / WEIGHTS
        if single.exists():
            _names(single)
            return (single,)
        index = self.path / INDEX
        if not index.exists():
            raise ArtifactError(f"{self.path}: {self._without_weights()}")
        try:
            table = bounded.parsed(bounded.text(index, bounded.JSON))["weight_map"]
            where = {str(name): str(file) for name, file in table.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{index}: not an index of shards, which has a weight_map ({quoted(error)})") from None
        files = sorted(set(where.values()))
        if not files:
            raise ArtifactError(f"{index}: its weight_map is empty")
        if strange := next((file for file in files if Path(file).name != file or not file.endswith(".safetensors")), None):
            raise ArtifactError(f"{index}: names the shard {strange!r}; shards are safetensors files beside their index")
        if missing := [file for file in files if not (self.path / file).exists()]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ArtifactError(
                f"{self.path}: lacks {', '.join(missing[:3])}{more} of {len(files)} shards that {INDEX} names; fetch them"
            )
        for file in files:
            held = _names(self.path / file)
            if lost := sorted(name for name, place in where.items() if place == file and name not in held):
                raise ArtifactError(f"{self.path / file}: lacks {lost[0]}, which {INDEX} says it holds")
        return tuple(self.path / file for file in files)

    def first_dtype(self) -> str | None:
        """The name that safetensors has for the first floating type in the weights, such as ``BF16``; None for no weights."""
        for shard in self.shards:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if (kind := str(file.get_slice(name).get_dtype())) in ("BF16", "F16", "F32", "F64"):
                        return kind
        return None

    def _without_config(self) -> str:
        if (self.path / ADAPTER).exists():
            return (
                f"an adapter ({ADAPTER}), not a whole model; prunekit import --hf BASE --hf {self.path} merges it into its base"
            )
        if found := checkpoints_in(self.path):
            return f"no {CONFIG}; name one of its folders, such as {found[-1].name}"
        return f"no {CONFIG}; name the folder that save_pretrained wrote"

    def _without_weights(self) -> str:
        if (other := next((name for name in OTHERS if (self.path / name).exists()), None)) is None:
            return f"has no weights; it must hold {WEIGHTS} or {INDEX}"
        bin_file = (
            f", or give --weights {self.path / other}, which torch's weights_only loader reads" if other.endswith(".bin") else ""
        )
        return f"has {other} and no safetensors file; save it again with save_pretrained(…, safe_serialization=True){bin_file}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The ``checkpoint-NUMBER`` folders that a trainer left in ``folder``, in the order of their numbers."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d{1,12})", path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def _names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file, of which the header alone is read.

    Raises:
        ArtifactError: it is damaged or cut off.
    """
    bounded.check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def _settings(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a config under its key, those of nested ones too, whose key then ends in theirs."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _settings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for value in config:
            yield from _settings(value, key)
    else:
        yield key, config
