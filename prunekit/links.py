"""Links that lead out of a run folder: none is followed, in reading or in writing."""

from __future__ import annotations

import os
from pathlib import Path

from prunekit.durable import LOCK, PREFIX
from prunekit.errors import ArtifactError

FOLDERS = ("trajectory", "trajectory.partial", "scores", "pruned", "explain", "cells", "runs")
"""What prunekit makes in a run folder, a study's or a pruned model's; other folders in there are their owner's."""
OURS = (LOCK, PREFIX)
"""How hidden names of prunekit's own begin; other hidden ones, of a folder that one works in, are left alone."""


def refuse_links_out(folder: Path) -> None:
    """Looks through a run folder, which may be a link itself, before anything in it is read or written.

    Raises:
        ArtifactError: names a link that leads out of it, and where to.
    """
    root = os.path.realpath(folder)
    waiting = [root]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = [entry for entry in entries if here != root or entry.name[0] != "." or entry.name.startswith(OURS)]
            for entry in found:
                if entry.is_symlink():
                    _check(folder, root, entry.path)
                elif (here != root or entry.name.startswith((*FOLDERS, *OURS))) and entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):  # something that was just removed
            continue
        except OSError as error:
            raise ArtifactError(f"{here}: cannot be looked through ({error.strerror or error})") from None


def _check(folder: Path, root: str, link: str) -> None:
    target = os.path.realpath(link)
    if target != root and not target.startswith(os.path.join(root, "")):
        shown = folder / os.path.relpath(link, root)
        raise ArtifactError(
            f"{shown}: is a link that leads out of the run folder, to {target}; a run is read and written inside its folder "
            "alone, so put there what the link leads to, or remove it"
        )
