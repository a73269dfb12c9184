"""What goes along with a model of transformers: its tokenizer, processor and way to generate, from the folder it came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from prunekit import bounded
from prunekit.huggingface.folder import INDEX

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model",
    "tokenizer.model", "added_tokens.json", "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "chat_template.*",
)  # fmt: skip
"""Names of files that are copied; nothing else of the folder is, code least of all."""


def source_of(model: Any) -> Path | None:
    """The local folder that the model was loaded from."""
    name = getattr(model, "name_or_path", "")
    path = Path(name) if name else None
    return path if path is not None and path.is_dir() else None


def copy_companions(source: Path | None, folder: Path) -> list[str]:
    """Copies what goes along; returns the names."""
    found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}) if source is not None else []
    names = []
    for path in found:
        if path.is_file():
            bounded.size(path)
            shutil.copyfile(path, folder / path.name)
            names.append(path.name)
    return names


def largest_shard(source: Path | None) -> int | None:
    """Bytes of the largest file of weights, where they came in several; None where they came in one."""
    if source is None or not (source / INDEX).is_file():
        return None
    return max((path.stat().st_size for path in source.glob("model-*.safetensors")), default=None)
