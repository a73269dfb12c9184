"""What report and info print."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def report(result: tuple[Path, list[str], list[str]]) -> None:
    path, left_out, missing = result
    for line in left_out:
        print(f"report: left out: {line}")
    for line in missing:
        print(f"report: {line}")
    print(f"report: {path}")


def info(result: dict[str, Any]) -> None:
    _tree(result, "")


def _tree(value: dict[str, Any], indent: str) -> None:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{key}:")
            _tree(inner, indent + "  ")
        else:
            print(f"{indent}{key}: {inner}")
