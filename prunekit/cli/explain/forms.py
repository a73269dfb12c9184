"""``explain RUN FORM …``: the run is named first, then what is explained, which is a command with a help of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup
from typer.main import get_group

from prunekit.cli.panels import Panelled, unset_flags, write_examples
from prunekit.errors import UsageError, nearest

FORMS = ("errors", "sample", "layer", "channel", "head", "weight", "pruned", "diff")
"""In the order of the help. One file of this folder holds one."""
RUN, EXPLAIN = "RUN", "prunekit explain"

Function = TypeVar("Function", bound=Callable[..., Any])
_forms = typer.Typer(rich_markup_mode=None)


class Form(Panelled):
    """One form: parsed as ``FORM RUN …``, to which ``Forms`` turns what was typed, and shown as ``explain RUN FORM …``."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        pieces = [piece for piece in self.collect_usage_pieces(ctx) if piece != f"{{{RUN}}}"]
        formatter.write_usage(f"{EXPLAIN} {RUN} {self.name}", " ".join(pieces))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UsageError for an option of another form, a word too many or too few."""
        try:
            rest = super().parse_args(ctx, args)
        except typer.TyperException as error:
            if option := getattr(error, "option_name", None):
                raise UsageError(f"explain RUN {self.name}: {_whose(ctx, option)}; {self._more()}") from None
            lacks = getattr(error, "param", None)
            if lacks is not None and error.format_message().startswith("Missing"):
                name = lacks.metavar or lacks.name
                raise UsageError(f"explain RUN {self.name}: of what? Give {name}; {self._more()}") from None
            raise
        if rest and not ctx.resilient_parsing:
            raise UsageError(f"explain RUN {self.name}: takes no {rest[0]!r}; leave {rest[0]!r} out ({self._more()})")
        return rest

    def written(self, ctx: Any) -> str:
        """``channel GROUP [UNIT]``."""
        pieces = (piece for parameter in self.params for piece in parameter.get_usage_pieces(ctx))
        return " ".join([str(self.name), *(p.strip("{}") for p in pieces if p != f"{{{RUN}}}")])

    def _more(self) -> str:
        return f"{EXPLAIN} {self.name} --help"


def form(
    *, examples: Mapping[str, str], headings: Mapping[str, Sequence[str]], name: str | None = None
) -> Callable[[Function], Function]:
    """Adds the decorated function to ``explain``, as ``prunekit.cli.verb.verb`` adds a verb. Its first parameter is the run."""

    def add(function: Function) -> Function:
        own = type(Form.__name__, (Form,), {"headings": headings, "examples": examples})
        settings = {"allow_extra_args": True}
        return _forms.command(name or function.__name__, cls=own, context_settings=settings)(function)

    return add


class Forms(TyperGroup):
    """The verb ``explain``. Its forms are built when it is called, so that no other verb waits for them."""

    headings: Mapping[str, Sequence[str]] = {}
    examples: Mapping[str, str] = {}

    @cached_property
    def forms(self) -> dict[str, Any]:
        for name in FORMS:
            import_module(f"prunekit.cli.explain.{name}")
        built = get_group(_forms).commands
        return {name: built[name] for name in FORMS}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.forms.get(cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(FORMS)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            args = self._form_first(args)
        except UsageError:
            if not ctx.resilient_parsing:  # a shell that completes takes what there is so far
                raise
        unset_flags(self, ctx)
        return super().parse_args(ctx, args)

    def _form_first(self, args: list[str]) -> list[str]:
        """``RUN FORM …``, ``RUN/pruned/NAME …`` and ``FORM --help`` with the form first.

        Raises:
            UsageError: there is no run, no form, or none of that name.
        """
        places = self._places(args)
        asks = any(option in args for option in ("--help", "-h"))
        first, second = ([args[place] for place in places] + ["", ""])[:2]
        if second in FORMS:
            place = places[1]
            return [second, *args[:place], *args[place + 1 :]]
        if first in FORMS and not (second and Path(first).exists()):
            if asks:
                return [first, "--help"]
            raise UsageError(f"explain {first}: the run comes first: {EXPLAIN} RUN {first}")
        if asks:
            return ["--help"]
        if second:
            raise UsageError(f"explain {second!r}: there is no such thing to explain; {nearest(second, list(FORMS))}")
        if first and Path(first).resolve().parent.name == "pruned":
            return ["pruned", *args]
        raise UsageError(
            f"explain {first or 'without a run'}: of what? Give WHAT and NAME, or RUN/pruned/NAME alone; {EXPLAIN} --help lists "
            "them"
        )

    def _places(self, args: Sequence[str]) -> list[int]:
        """Where the words are that are neither options nor their values."""
        parameters = [parameter for command in self.forms.values() for parameter in command.params]
        valued = {option for p in parameters if p.param_type_name == "option" and not p.is_flag for option in p.opts}
        found: list[int] = []
        place = 0
        while place < len(args):
            if args[place] == "--":
                return [*found, *range(place + 1, len(args))]
            if args[place] in valued:
                place += 1
            elif not args[place].startswith("-"):
                found.append(place)
            place += 1
        return found

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(EXPLAIN, f"{RUN} WHAT [NAME] [OPTIONS]")
        formatter.write_usage(EXPLAIN, f"{RUN}/pruned/NAME [OPTIONS]", prefix="   or: ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = self.forms.values()
        with formatter.section("What"):
            formatter.write_dl([(one.written(ctx), one.get_short_help_str(WIDEST)) for one in commands])
        with formatter.section("Options"):
            formatter.write_dl([(f"{RUN} WHAT --help", f"Those of one of them, also as {EXPLAIN} WHAT --help.")])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_examples(formatter, self.examples)


WIDEST = 200
"""Characters of a form's summary, which may wrap."""


def _whose(ctx: Any, option: str) -> str:
    """Which forms have an option that this one lacks."""
    others = [
        name for name, other in ctx.parent.command.forms.items() if any(option in parameter.opts for parameter in other.params)
    ]
    if not others:
        return f"there is no option {option}"
    return f"has no {option}; that is an option of {', '.join(f'explain RUN {name}' for name in others)}"
