"""Help in panels: a verb's options under headings that say what they are about, and examples by what somebody wants to have."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMON = {"Run and output": ("out", "name", "dry_run", "device", "seed", "overwrite", "quiet", "as_json", "help")}
"""The last panel of every verb."""
ELSEWHERE = "Options"
"""Where an option stands that no heading names; no verb has one."""
WIDTH = 80
"""Columns of an example at most."""


class Panelled(TyperCommand):
    """A command whose ``--help`` lists its options under headings and ends with examples.

    Attributes:
        headings: heading -> names of parameters.
        examples: what somebody wants to have -> the command that gives it.
    """

    headings: Mapping[str, Sequence[str]] = {}
    examples: Mapping[str, str] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter, self.headings)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_examples(formatter, self.examples)


def unset_flags(command: TyperGroup, ctx: Any) -> None:
    """Makes flags that are not given false. The parser's own are None, and it imports pydantic to read that, which takes long."""
    for option in command.get_params(ctx):
        if getattr(option, "is_bool_flag", False) and option.default is None:
            option.default = False


def write_options(command: TyperCommand | TyperGroup, ctx: Any, formatter: Any, headings: Mapping[str, Sequence[str]]) -> None:
    wanted = {**headings, **COMMON}
    place = {name: heading for heading, names in reversed(wanted.items()) for name in names}
    rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], ELSEWHERE: [], **{heading: [] for heading in wanted}}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            kind = "Arguments" if parameter.param_type_name == "argument" else place.get(str(parameter.name), ELSEWHERE)
            rows[kind].append(record)
    for heading, records in rows.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def write_examples(formatter: Any, examples: Mapping[str, str]) -> None:
    """Each with what it is for above it; a long one goes on behind a backslash, as a shell reads it."""
    if not examples:
        return
    with formatter.section("Examples"):
        for job, command in examples.items():
            formatter.write_text(f"{job}:")
            formatter.write("".join(f"    {line}\n" for line in broken(command, WIDTH - 4)))


def broken(command: str, width: int) -> list[str]:
    """A command as lines of ``width`` columns at most, words and options with their values whole; all but the last end with a
    backslash.
    """
    if len(command) <= width:
        return [command]
    parts: list[str] = []
    for word in shlex.split(command):
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}"
    return lines
