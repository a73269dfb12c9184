"""What report, info and trust print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.errors import plain


def report(result: tuple[Path, list[str], list[str]]) -> None:
    path, left_out, missing = result
    for line in left_out:
        print(f"report: left out: {line}")
    for line in missing:
        print(f"report: {line}")
    print(f"report: {path}")


def trust(result: tuple[Path, list[Any]]) -> None:
    run, named = result
    if not named:
        print(f"trust: {run}: its recipe names nothing that would have to be trusted")
    for one in named:
        print(f"trust: {plain(one.key)}: {plain(one.path)}, from {plain(one.file)}")


def info(result: dict[str, Any]) -> None:
    _tree(result, "")


def _tree(value: dict[str, Any], indent: str) -> None:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{key}:")
            _tree(inner, indent + "  ")
        else:
            print(f"{indent}{key}: {inner}")
