"""How a model comes out of its folder: with its weights, all of them or it is refused, or as its config says it alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.errors import ArtifactError, Note, UsageError, theirs
from prunekit.huggingface.classes import model_class, read_config, transformers
from prunekit.huggingface.folder import CONFIG, Folder
from prunekit.imports import needed

AUTO = r"AutoModel(?:For[A-Za-z0-9]+|WithLMHead)?"
"""What the name of an Auto class looks like."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def load_model(
    path: Path, auto: str | None = None, device: torch.device | str | None = None, offload: Path | None = None
) -> nn.Module:
    """The model with its weights, as ``from_pretrained`` gives it: in evaluation mode, in the checkpoint's type.

    Nothing is fetched, unpickled or run that lies in the folder.

    Args:
        auto: name of an Auto class, such as ``AutoModelForCausalLM``, instead of the config's ``architectures``.
        device: where the weights go one by one as they are read, never whole in this machine's memory; needs accelerate. None for
            the CPU.
        offload: a folder, with which no weight is read: accelerate's hooks read a layer's from ``path`` when it is called, and
            drop them again. Weights that the class holds in another form than the files are written into the folder once.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights do not fit the class; names the first tensor.
        UsageError: transformers is not installed, or has no such class.
    """
    folder = Folder(path)
    _ = folder.shards
    placed: dict[str, Any] = {}
    if device is not None or offload is not None:
        needed("accelerate")
        placed = {"device_map": {"": "disk" if offload is not None else torch.device(str(device))}, "offload_folder": offload}
    kind = model_class(folder, auto)
    with theirs(f"{path}: loading {kind.__name__}"), quietly():
        model, info = kind.from_pretrained(
            path, config=read_config(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True, **typed(folder), **placed,
        )  # fmt: skip
    _check(folder, model, info)
    found: nn.Module = model
    return found


def new_model(path: Path, auto: str | None = None) -> nn.Module:
    """The same model as its config says it, initialised by torch's random numbers; no weights are read.

    Raises:
        ArtifactError: there is no config.
        UsageError: see ``load_model``.
    """
    folder = Folder(path)
    kind = model_class(folder, auto)
    with theirs(f"{path}: making {kind.__name__}"), quietly():
        model: nn.Module = kind._from_config(read_config(folder), **typed(folder))
    return model.eval()


def typed(folder: Folder) -> dict[str, Any]:
    """The argument for the weights' type: the config's, or else that of the first floating tensor; whole models have one."""
    key = "torch_dtype" if int(transformers().__version__.partition(".")[0]) < 5 else "dtype"
    said = folder.config.get("dtype", folder.config.get("torch_dtype"))
    if said is not None:
        kind = getattr(torch, str(said).removeprefix("torch."), None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise UsageError(f"{folder.path / CONFIG}: dtype is {said!r:.80}; it must be float32, bfloat16, float16 or float64")
        return {key: kind}
    try:
        first = folder.first_dtype()
    except ArtifactError:  # a folder whose weights are no longer there: numbers come from elsewhere
        first = None
    return {key: DTYPES[first or "F32"]}


def _check(folder: Folder, model: Any, info: dict[str, Any]) -> None:
    """Refuses weights that are not those of the class, all of them; notes what the class leaves unread."""
    name = type(model).__name__
    if mismatched := sorted(info["mismatched_keys"]):
        key, held, wanted = mismatched[0]
        raise ArtifactError(
            f"{folder.path}: {key} has shape {tuple(held)}, {name} has {tuple(wanted)} by {CONFIG}{_others(mismatched)}; "
            "the weights are of another config"
        )
    if missing := sorted(info["missing_keys"]):
        head = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
        raise ArtifactError(
            f"{folder.path}: lacks {(head or missing)[0]}, which {name} needs{_others(missing)}, and which would be random: "
            "of a base model train that head first, or name the class that it is of by auto; else save the whole model again"
        )
    if errors := info.get("error_msgs"):
        raise ArtifactError(f"{folder.path}: {name} cannot take the weights ({' '.join(str(errors[0]).split())[:200]})")
    if unread := sorted(info["unexpected_keys"]):
        text = f"{folder.path}: {name} has no place for {unread[0]}{_others(unread)}; left out"
        warnings.warn(text, Note, stacklevel=3)


def _others(keys: list[Any]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


@contextmanager
def quietly() -> Iterator[None]:
    """transformers says nothing meanwhile: what matters of it is said by prunekit, in one line."""
    from transformers.utils import logging as said

    level, bar = said.get_verbosity(), said.is_progress_bar_enabled()
    placing = logging.getLogger("accelerate.big_modeling")
    of_placing, placing.disabled = placing.disabled, True
    said.set_verbosity(logging.CRITICAL)
    said.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        placing.disabled = of_placing
        said.set_verbosity(level)
        if bar:
            said.enable_progress_bar()
