"""import --hf: models in Hugging Face folders become a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import UsageError
from prunekit.huggingface import CONFIG, Series, checkpoints_in, is_adapter, with_base
from prunekit.recipe import Recipe
from prunekit.verbs.checks import Check
from prunekit.verbs.training import import_run


def folders_of(given: Sequence[str | Path]) -> list[Path]:
    """The models' folders; where a trainer left its checkpoints and no model beside them, those in order.

    Adapters alone get their base model's folder in front.

    Raises:
        UsageError: there is none, or the adapters have several bases.
        ArtifactError: the base of an adapter is not here.
    """
    found = [one for place in map(Path, given) for one in _inside(place)]
    if not found:
        raise UsageError(f"name a folder with {CONFIG} and safetensors")
    return with_base(found)


def model_section(folders: Sequence[Path], auto: str | None = None) -> dict[str, Any]:
    """What a recipe's ``model`` says of the folders: whose config it is made from (of adapters their base's), and the class.

    Raises:
        UsageError, ArtifactError: see ``prunekit.huggingface.Series``.
    """
    series = Series(folders, auto)
    return {"pretrained": str(series.model.absolute()), "auto": series.auto}


def import_folders(
    recipe: Recipe,
    folders: Sequence[Path],
    out: Path,
    overwrite: bool = False,
    announce: Callable[[str], None] = print,
    check: Check | None = None,
) -> dict[str, Any]:
    """Puts the models in ``folders`` under ``out``, in training order; the recipe's model is the last (``model_section``).

    One alone is read once, and is never in memory twice. A head that an earlier folder lacks is added to what may not be pruned.

    Args:
        check: see ``import_run``.

    Returns:
        the same facts as ``import_run``.

    Raises:
        ArtifactError: a file is missing, damaged or does not fit the class, or ``out`` holds something else.
        UsageError: transformers is not installed, or has no such class.
    """
    if len(folders) == 1:
        return import_run(recipe, [], out, overwrite, announce, check=check)
    series = Series(folders, recipe.model.auto)
    series.look()
    for note in series.notes:
        announce(f"import: note: {note}")
    whole = [f"{name.rpartition('.')[0]}.*" for name in series.head]
    ignore = list(dict.fromkeys([*recipe.prunable.ignore, *whole]))
    recipe = recipe.model_copy(update={"prunable": recipe.prunable.model_copy(update={"ignore": ignore})})
    return import_run(recipe, series.folders, out, overwrite, announce, series.read, check)


def _inside(place: Path) -> list[Path]:
    whole = (place / CONFIG).exists() or is_adapter(place)
    return (checkpoints_in(place) if place.is_dir() and not whole else []) or [place]
