"""Runs and recipes that a verb works on, with what its options override."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_run(path: Path, device: str | None, *, code: bool = True) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.verbs.run_folder import Run

    use_working_folder(path)
    return Run(path, device, code=code)


def open_spread(path: Path, device_map: str) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.verbs.placement import device_map_of
    from prunekit.verbs.spreading import SpreadRun

    use_working_folder(path)
    return SpreadRun(path, device_map_of(device_map))


def read_recipe(path: Path, out: Path, seed: int | None, device: str | None) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.recipe import Recipe

    use_working_folder(out)
    return _overridden(Recipe.load(path), seed, device)


def recipe_of(content: dict[str, Any], source: str, out: Path, seed: int | None, device: str | None) -> Any:
    from prunekit.imports import use_working_folder
    from prunekit.recipe import Recipe

    use_working_folder(out)
    return _overridden(Recipe.of(content, source), seed, device)


def _overridden(recipe: Any, seed: int | None, device: str | None) -> Any:
    changes = {k: v for k, v in {"seed": seed, "device": device}.items() if v is not None}
    return type(recipe).of({**recipe.model_dump(mode="json"), **changes}, "command line") if changes else recipe
