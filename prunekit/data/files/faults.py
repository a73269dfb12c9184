"""Broken rows: the first one ends the reading, or they are left out and counted."""

from __future__ import annotations

from pathlib import Path

from prunekit.errors import ArtifactError


class Faults:
    """What was wrong with rows.

    Args:
        skip: broken rows are left out.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.count, self.first = skip, 0, ""

    def add(self, path: Path | str, where: str, why: str) -> None:
        """One row more that is broken.

        Raises:
            ArtifactError: broken rows are not left out.
        """
        text = f"{path}: {where}: {why}"
        if not self.skip:
            raise ArtifactError(f"{text}; mend it, or leave broken rows out with skip_bad (--skip-bad)")
        self.count += 1
        self.first = self.first or text

    @property
    def note(self) -> str | None:
        """What was left out; None for nothing."""
        rows = "1 broken row" if self.count == 1 else f"{self.count:,} broken rows, the first"
        return f"data: left out {rows}: {self.first}" if self.count else None
