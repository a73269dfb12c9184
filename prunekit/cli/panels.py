"""Help in panels: a verb's options under headings that say what they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

COMMON = {"Run and output": ("device", "seed", "overwrite", "quiet", "as_json", "help")}
"""The last panel of every verb."""


def panels(headings: Mapping[str, Sequence[str]]) -> type[TyperCommand]:
    """A command whose ``--help`` lists its options under ``headings``.

    Args:
        headings: heading -> names of parameters; those that no heading names come first, under ``Options``.
    """
    wanted = {**headings, **COMMON}

    class Panelled(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            place = {name: heading for heading, names in wanted.items() for name in names}
            rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], **{heading: [] for heading in wanted}}
            for parameter in self.get_params(ctx):
                record = parameter.get_help_record(ctx)
                if record is not None:
                    kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                    rows[place.get(str(parameter.name), kind)].append(record)
            for heading, records in rows.items():
                if records:
                    with formatter.section(heading):
                        formatter.write_dl(records)

    return Panelled
