"""info: what an artifact is, what it was made from, and what it cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prunekit import checkpoint, durable
from prunekit.apply import Manifest
from prunekit.criteria.spec import text_of
from prunekit.errors import ArtifactError
from prunekit.links import FOLDERS, refuse_links_out
from prunekit.recipe import Recipe
from prunekit.remote import Place, Remote
from prunekit.trajectory import Trajectory

WRITTEN = (
    "train.json", "compare.json", "timeline.json", "eval.json", "removal.json", "prunekit.json", "reconstruction.safetensors",
    "plan.safetensors", "model.safetensors", "masks.safetensors",
)  # fmt: skip
"""Artifacts of a run and of its pruned models; beside them ``sensitivity-*.json``, and whatever lies in ``scores``."""

STUDY = "compare.json"
"""A study's result, in its folder; a run has a recipe beside its own."""


def info(path: Place) -> dict[str, Any]:
    """Facts about any artifact of prunekit's, a run folder, a recipe, or a safetensors file from elsewhere.

    On a store: about a recording, a study, or a JSON file, read without the files that it tells of.

    Raises:
        ArtifactError: there is nothing, or nothing that prunekit knows.
    """
    if isinstance(path, Path) and not os.path.lexists(path):
        raise ArtifactError(f"{path}: no such file or folder")
    with checkpoint.reading(path, "artifact"):
        return _stored(path) if isinstance(path, Remote) else _describe(path)


def _stored(path: Remote) -> dict[str, Any]:
    if path.name.endswith(".json"):
        return _json(path)
    if (path / "trajectory.json").exists():
        return _trajectory(path)
    if (path / STUDY).exists():
        return _json(path / STUDY)
    raise ArtifactError(
        f"{path}: neither a recording nor a study (no trajectory.json or {STUDY}); copy anything else to this machine first"
    )


def _describe(path: Path) -> dict[str, Any]:
    if path.is_dir():
        refuse_links_out(path)
        durable.opened(path)
        found = _folder(path)
        proved = _prove(path)
        return found | ({"proved": proved} if found["kind"] == "run" else {})
    if path.suffix == ".safetensors":
        return _tensors(path)
    if path.suffix in (".yaml", ".yml"):
        return {"kind": "recipe", "path": str(path), **Recipe.load(path).model_dump(mode="json")}
    if path.suffix == ".json":
        return _json(path)
    raise ArtifactError(f"{path}: not an artifact of prunekit's")


def _json(path: Place) -> dict[str, Any]:
    content = checkpoint.read_json(path)
    bulky = {k: f"{len(v)} entries" for k, v in content.items() if isinstance(v, list | dict) and len(str(v)) > 1500}
    return {"kind": content["kind"], "path": str(path), **content, **bulky}


def _trajectory(path: Place) -> dict[str, Any]:
    trajectory = Trajectory(path)
    optimizer = trajectory.header["optimizer"]
    return {
        "kind": "trajectory",
        "path": str(path),
        "complete": trajectory.complete,
        "steps": len(trajectory),
        "coordinates": trajectory.layout.total,
        "bytes": trajectory.bytes,
        "hash": trajectory.hash,
        "optimizer": optimizer["name"] if optimizer else "unknown (its states alone are known)",
        "made_from": trajectory.provenance,
        "cost": trajectory.header.get("cost", {}),
    }


def _folder(path: Path) -> dict[str, Any]:
    if (path / "trajectory.json").exists():
        return _trajectory(path)
    if (path / "prunekit.json").exists():
        with checkpoint.reading(path / "prunekit.json", "manifest"):
            manifest = Manifest.load(path / "prunekit.json")
            return {"kind": "pruned", "path": str(path), "structure": manifest.structure, "plan": manifest.plan,
                    "made_from": _brief(manifest.provenance), **manifest.facts,
                    "files": {p.name: p.stat().st_size for p in sorted(path.iterdir())}}  # fmt: skip
    if (path / "recipe.yaml").exists():
        recipe = Recipe.load(path / "recipe.yaml")
        return {
            "kind": "run",
            "path": str(path),
            "model": recipe.model.source,
            "data": recipe.data.source if recipe.data else None,
            "seed": recipe.seed,
            "trajectory": _folder(path / "trajectory") if (path / "trajectory" / "trajectory.json").exists() else None,
            "scores": sorted(_criterion(p.stem) for p in (path / "scores").glob("[!.]*.safetensors")),
            "compared": (path / "compare.json").exists(),
            "pruned": sorted(p.parent.name for p in (path / "pruned").glob("[!.]*/prunekit.json")),
        }
    if (path / "plan.safetensors").exists():
        return _tensors(path / "plan.safetensors")
    if (path / STUDY).exists():
        return _json(path / STUDY)
    raise ArtifactError(f"{path}: not a folder of prunekit's (no recipe.yaml, trajectory.json, prunekit.json or {STUDY})")


def _prove(folder: Path) -> int:
    """Reads every artifact below a folder, and so compares it with its checksum; returns how many files there are.

    What else its owner keeps there is left alone.

    Raises:
        ArtifactError: the first that is damaged, or was changed after it was written.
    """
    if (folder / "trajectory.json").exists():
        trajectory = Trajectory(folder)
        if trajectory.complete:
            trajectory.verify()
        return sum(1 for _ in folder.iterdir())
    count, known = 0, set[str]()
    if (folder / "prunekit.json").exists():
        known = {"prunekit.json", *Manifest.load(folder / "prunekit.json").prove(folder)}
        count = len(known)
    for path in sorted(folder.glob("[!.]*")):
        if path.is_dir():
            count += _prove(path) if path.name in FOLDERS or folder.name in FOLDERS else 0
        elif path.name in known or not (path.name in WRITTEN or path.name.startswith("sensitivity-") or _of_scores(folder)):
            continue
        elif path.suffix == ".json":
            checkpoint.read_json(path)
            count += 1
        elif path.suffix == ".safetensors":
            checkpoint.read_tensors(path, changed=path.name == "plan.safetensors")
            count += 1
    return count


def _of_scores(folder: Path) -> bool:
    return "scores" in (folder.name, folder.parent.name)


def _brief(provenance: dict[str, Any]) -> dict[str, Any]:
    """A refined plan's history is long: how many entries it has."""

    def brief(refined: Any) -> dict[str, Any]:
        if not isinstance(refined, dict):
            raise TypeError(f"refine is {refined!r}; it holds what refining did")
        return {**refined, "history": f"{len(refined['history'])} entries"}

    found = dict(provenance)
    if "refine" in found:
        found["refine"] = brief(found["refine"])
    if "refine_again" in found:
        found["refine_again"] = [brief(refined) for refined in found["refine_again"]]
    return found


def _criterion(name: str) -> str:
    """A criterion from the name of its file; the name itself where it was cut."""
    try:
        return text_of(name)
    except ValueError:
        return name


def _tensors(path: Path) -> dict[str, Any]:
    header = checkpoint.read_header(path)
    tensors = checkpoint.read_tensors(path)
    facts = {k: v for k, v in header.items() if k not in ("kind", "provenance", "shapes")}
    return {
        "kind": header.get("kind", "safetensors from elsewhere"),
        "path": str(path),
        **facts,
        **({"made_from": _brief(header["provenance"])} if "provenance" in header else {}),
        "bytes": path.stat().st_size,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
