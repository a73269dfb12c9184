"""Whether what lies there is what would be made again: what artifacts were made from, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunekit.errors import ArtifactError, PrunekitError

PROBLEM = "problem"


def recorded_inputs(path: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the artifact at ``path`` says that it was made from, in the form that ``reusable`` takes.

    Args:
        read: gives it, or raises PrunekitError when the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return dict(read(path))
    except PrunekitError as error:
        return {PROBLEM: str(error)}


def reusable(what: Path, found: Mapping[str, Any] | None, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether an existing artifact is what would be made again.

    Args:
        found: what the artifact says it was made from; None when there is no artifact; ``{PROBLEM: why}`` when it
            is there but cannot be reused whatever the inputs.
        wanted: what it would be made from now.

    Raises:
        ArtifactError: it was made from something else, and may not be overwritten; the first difference is named.
    """
    if found is None or overwrite:
        return False
    if PROBLEM in found:
        raise ArtifactError(f"{what}: exists and cannot be reused: {found[PROBLEM]}; use --overwrite to replace it")
    difference = first_difference(found, wanted)
    if difference is None:
        return True
    raise ArtifactError(f"{what}: exists, made from other inputs ({difference}); use --overwrite to replace it")


def first_difference(found: Any, wanted: Any, key: str = "") -> str | None:
    """``key: old, now new`` of the first differing value, or None."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in [*wanted, *(n for n in found if n not in wanted)]:
            inner = first_difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else str(name))
            if inner is not None:
                return inner
        return None
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return next((inner for k, (a, b) in pairs if (inner := first_difference(a, b, f"{key}.{k}")) is not None), None)
    if found == wanted:
        return None
    return f"{key} was {_short(found)}, is now {_short(wanted)}"


def as_noted(now: Mapping[str, Any], noted: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's facts those whose keys were noted: older recordings lack sections, and keys in them, that have come since."""

    def section(now: Any, noted: Any) -> Any:
        both = isinstance(now, Mapping) and isinstance(noted, Mapping)
        return {key: value for key, value in now.items() if key in noted} if both else now

    return {key: section(now[key], value) for key, value in noted.items() if key in now}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
