"""Models of transformers: known by their class without transformers, and loaded from a folder whose config is not enough."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from prunekit.apply.manifest import load
from prunekit.huggingface import load_model, new_model


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a ``PreTrainedModel``; transformers is not imported."""
    return any(kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def load_hf(folder: str | Path) -> nn.Module:
    """Gives back a pruned model of transformers from a folder that ``prunekit export --to hf`` wrote, in evaluation mode.

    Where transformers' own ``from_pretrained`` loads the folder, this gives the same model. It is needed where layers have
    other numbers of heads or neurons, which no config says.

    Raises:
        UsageError: transformers is not installed, has no such class, or does not load what is in the folder.
        ArtifactError: files are missing, damaged, or of a kind that prunekit does not read (docs/huggingface.md).

    Example:
        >>> import prunekit
        >>> prunekit.load_hf("nowhere")
        Traceback (most recent call last):
        ...
        prunekit.errors.ArtifactError: nowhere: no such folder; name a folder with config.json and model.safetensors
    """
    folder = Path(folder)
    if not (folder / "prunekit.json").is_file():
        return load_model(folder)
    return load(folder, lambda: new_model(folder))
