"""import --hf: models in Hugging Face folders become a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.errors import UsageError
from prunekit.huggingface import CONFIG, checkpoints_in, read_state
from prunekit.recipe import Recipe
from prunekit.verbs.training import import_run


def folders_of(given: Sequence[str | Path]) -> list[Path]:
    """The models' folders; where a trainer left its checkpoints and no model beside them, those in order.

    Raises:
        UsageError: there is none.
    """
    found = [one for place in map(Path, given) for one in _inside(place)]
    if not found:
        raise UsageError(f"name a folder with {CONFIG} and safetensors")
    return found


def import_folders(
    recipe: Recipe, folders: Sequence[Path], out: Path, overwrite: bool = False, announce: Callable[[str], None] = print
) -> dict[str, Any]:
    """Puts the models in ``folders`` under ``out``, in training order; the recipe's model is the last.

    One alone is read once, and is never in memory twice.

    Returns:
        the same facts as ``import_run``.

    Raises:
        ArtifactError: a file is missing, damaged or does not fit the class, or ``out`` holds something else.
        UsageError: transformers is not installed, or has no such class.
    """
    if len(folders) == 1:
        return import_run(recipe, [], out, overwrite, announce)
    return import_run(recipe, folders, out, overwrite, announce, partial(read_state, auto=recipe.model.auto))


def _inside(place: Path) -> list[Path]:
    found = checkpoints_in(place) if place.is_dir() and not (place / CONFIG).exists() else []
    return found or [place]
