"""What a verb declares: its place in the help, its examples, the headings of its options. One file here holds one verb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from prunekit.cli.panels import Panelled
from prunekit.cli.top import app

Function = TypeVar("Function", bound=Callable[..., Any])

_AFTER: dict[str, str] = {}
"""Verb -> the verb that it follows in ``prunekit --help``."""

SHARED: set[str] = set()
"""Verbs whose work several ranks share (``prunekit.ranks``)."""


def verb(
    *,
    after: str,
    examples: Mapping[str, str],
    name: str | None = None,
    headings: Mapping[str, Sequence[str]] | None = None,
    kind: type[Any] = Panelled,
    shared: bool = False,
) -> Callable[[Function], Function]:
    """Adds the decorated function to the command line: its parameters are the options, its docstring is the help.

    Args:
        after: the verb that it follows in ``prunekit --help``; the first follows ``""``.
        examples: what somebody wants to have -> the command that gives it, for the end of the help.
        name: of the verb, where the function cannot be called so.
        headings: heading -> names of parameters; what every verb has stands under the last one, see ``panels.COMMON``.
        kind: the class of the command, with ``headings`` and ``examples``.
        shared: several processes of ``torchrun`` may share its work; others refuse them.
    """

    def add(function: Function) -> Function:
        called = name or function.__name__
        _AFTER[called] = after
        if shared:
            SHARED.add(called)
        own = type(kind.__name__, (kind,), {"headings": headings or {}, "examples": examples})
        return app.command(called, cls=own)(function)

    return add


def put_in_order() -> None:
    """Orders the help as the verbs ask for. Of those that follow the same one, they come first that nobody follows, by name.

    Raises:
        LookupError: a verb follows one that does not exist.
    """
    order: list[str] = []

    def follow(before: str) -> None:
        behind = [one for one, after in _AFTER.items() if after == before]
        for called in sorted(behind, key=lambda one: (one in _AFTER.values(), one)):
            order.append(called)
            follow(called)

    follow("")
    if lost := sorted({*_AFTER} - {*order}):
        raise LookupError(f"verb {lost[0]} follows {_AFTER[lost[0]]!r}, which is no verb")
    app.registered_commands.sort(key=lambda command: order.index(str(command.name)))
