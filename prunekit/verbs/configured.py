"""Whether a pretrained model's config.json is still the one that a run was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.errors import ArtifactError
from prunekit.huggingface import Folder
from prunekit.recipe import Recipe
from prunekit.trajectory import Trajectory

CONFIGURED = "config"
"""Key in the provenance of a pretrained model's trajectory: the hash of its config."""


def config_facts(recipe: Recipe) -> dict[str, Any]:
    """For the provenance of a pretrained model's run: a hash of the config that its class is made from; else nothing."""
    if recipe.model.pretrained is None:
        return {}
    return {CONFIGURED: Folder(Path(recipe.model.pretrained)).config_digest()}


def check_config(recipe: Recipe, trajectory: Trajectory) -> None:
    """Refuses to make a run's model from another config than the one that its trajectory is of.

    Raises:
        ArtifactError: it is another, or is gone; names it and both hashes.
    """
    noted, now = trajectory.provenance.get(CONFIGURED), config_facts(recipe).get(CONFIGURED)
    if noted != now:
        raise ArtifactError(
            f"{recipe.model.source}/config.json: not what the run was made with (its hash is {now}, it was {noted}); "
            "put back what it was, or import again with --overwrite"
        )
