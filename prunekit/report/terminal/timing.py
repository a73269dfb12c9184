"""What latency prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunekit.report.measures import three
from prunekit.report.terminal.language import show_generation
from prunekit.report.terminal.tables import new_table, print_table


def show_timing(result: dict[str, Any]) -> None:
    batches = result["batches"]
    columns = {"dense": "dense (ms)", "pruned": "pruned (ms)", "speedup": "speed-up"}
    first = next(iter(batches.values()))
    there = [name for name in columns if name in first]
    table = new_table(f"latency: {result['name']}", "batch", *(columns[name] for name in there), "rounds")
    for size, found in batches.items():
        table.add_row(size, *(_told(found[name], "×" if name == "speedup" else "") for name in there), str(found["rounds"]))
    print_table(table)
    print(f"on {result['device']}: {result['machine']}")
    print(result["conditions"])
    if "generation" in result:
        show_generation(result["generation"])
    if noisy := [size for size, found in batches.items() if found["noisy"]]:
        print(f"batch {', '.join(noisy)}: the machine was too noisy; the interval is wider than 3 % either way")


def _told(found: Mapping[str, float], unit: str) -> str:
    return f"{three(found['median'])}{unit} ({three(found['low'])}–{three(found['high'])})"
