"""Models of transformers: known by their class without transformers, and loaded from a folder whose config is not enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from prunekit.apply.manifest import load
from prunekit.errors import ArtifactError, theirs
from prunekit.imports import needed

CONFIG = "config.json"


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a ``PreTrainedModel``; transformers is not imported."""
    return any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def load_hf(folder: str | Path) -> nn.Module:
    """Gives back a pruned model of transformers from a folder that ``prunekit export --to hf`` wrote, in evaluation mode.

    Where transformers' own ``from_pretrained`` loads the folder, this gives the same model. It is needed where layers have
    other numbers of heads or neurons, which no config says.

    Raises:
        UsageError: transformers is not installed, or does not load what is in the folder.
        ArtifactError: files are missing or damaged, or the config names a class that transformers does not have.

    Example:
        >>> import prunekit
        >>> prunekit.load_hf("nowhere")
        Traceback (most recent call last):
        ...
        prunekit.errors.ArtifactError: nowhere/config.json: no such file; a folder of transformers has one
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder / CONFIG}: no such file; a folder of transformers has one")
    transformers = needed("transformers")
    with theirs(f"{folder}: transformers' loading"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = _class_of(transformers, config, folder)
        if not (folder / "prunekit.json").is_file():
            found: nn.Module = kind.from_pretrained(folder, dtype="auto").eval()
            return found

        def dense() -> Any:
            model = kind(config)
            return model if config.dtype is None else model.to(config.dtype)

        return load(folder, dense)


def _class_of(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that a config names."""
    named = (getattr(config, "architectures", None) or [None])[0]
    kind = getattr(transformers, str(named), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ArtifactError(f"{folder / CONFIG}: architectures names {named!r}, which is no model of transformers")
    return kind
