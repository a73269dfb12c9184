"""Things by name: prunekit's own in a table, a user's by import path, an installed package's by entry point.

One class for criteria, structures, optimizer rules and tasks. A table's own names always win. ``module:name`` is imported by
``prunekit.imports`` and nowhere else. A package offers a thing in its ``pyproject.toml``:

```toml
[project.entry-points."prunekit.criteria"]
steady = "my_package.criteria:CRITERION"
```

Whether a name is *known* is answered from the table, the spelling and the packages' metadata alone: reading a recipe runs no
code of anybody's. Code is imported when the thing is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

from prunekit.errors import UsageError, nearest
from prunekit.imports import IMPORT_PATH, is_installed, load_object

T = TypeVar("T")


class Registry(dict[str, T]):
    """A table from name to thing. ``table[name]`` also finds what an import path or an entry point names.

    Iteration, ``len`` and ``items`` are about the table's own entries; ``in`` also holds for import paths and entry points.

    Args:
        what: one of the things in messages, such as ``criterion``.
        group: of entry points, such as ``prunekit.criteria``; None for none.
        accept: ``(object, its name) -> thing``; raises UsageError for an object that cannot be one.
        entries: the table itself.
    """

    def __init__(
        self,
        what: str,
        group: str,
        accept: Callable[[Any, str], T],
        entries: Mapping[str, T],
    ) -> None:
        super().__init__(entries)
        self.what, self.group, self.accept = what, group, accept

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and (self._is_path(name) or bool(self._offers(name))))

    def __missing__(self, name: str) -> T:
        path = self.path(name)
        return self.accept(load_object(path, self._asked(name)), name)

    def names(self) -> list[str]:
        """Every name that does not need a module said: the table's own, then the installed packages'."""
        return [*self, *sorted({point.name for point in offered(self.group)} - {*self})]

    def path(self, name: str) -> str:
        """``module:name`` of what is not in the table.

        Raises:
            UsageError: there is none; near names are offered. Or several packages offer it.
        """
        if self._is_path(name):
            return name
        points = self._offers(name)
        if not points:
            own = f"or module:{self.what.split()[-1]} of your own"
            raise UsageError(f"{self.what} {name!r} does not exist; {nearest(name, self.names())}, {own}")
        if len(points) > 1:
            raise UsageError(f"{self.what} {name!r} is offered by {' and '.join(_package(p) for p in points)}; uninstall one")
        return points[0].value.partition("[")[0].replace(" ", "")

    def told(self, name: str) -> T | None:
        """What a file means by a name: the table's own or a package's; nothing for an import path, since a file names no code."""
        return None if self._is_path(name) or name not in self else self[name]

    def is_own(self, name: str) -> bool:
        """Whether the table itself holds it."""
        return super().__contains__(name)

    def _is_path(self, name: str) -> bool:
        return re.fullmatch(IMPORT_PATH, name) is not None

    def _offers(self, name: str) -> list[EntryPoint]:
        return [point for point in offered(self.group) if point.name == name]

    def _asked(self, name: str) -> str:
        """What asked for an import, for the message."""
        points = [] if self._is_path(name) else self._offers(name)
        return f"{self.what} {name!r} of package {_package(points[0])} (entry point in {self.group})" if points else self.what


def held_by_files(package: ModuleType, attribute: str) -> dict[str, Any]:
    """A table made of a folder: each file's name, and what the file calls ``attribute``, in the order of the alphabet.

    Example:
        >>> from prunekit.structure import units
        >>> list(held_by_files(units, "STRUCTURE"))
        ['channels', 'heads', 'layers']
    """
    files = (import_module(f"{package.__name__}.{file.name}") for file in iter_modules(package.__path__))
    return {file.__name__.rpartition(".")[2]: getattr(file, attribute) for file in files}


@cache
def offered(group: str) -> tuple[EntryPoint, ...]:
    """What installed packages offer in a group, looked up once; nothing of theirs is imported.

    A folder that one works in is no place of installed packages, whatever metadata somebody put there.
    """
    found = {(point.name, point.value): point for point in entry_points(group=group) if _installed(point)}
    return tuple(found.values())


def _installed(point: EntryPoint) -> bool:
    return point.dist is None or is_installed(Path(str(point.dist.locate_file(""))))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
