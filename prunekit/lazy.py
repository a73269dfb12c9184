"""Names of a package that are imported when they are first looked at, as its ``__init__.pyi`` lists them.

Nothing but importlib is needed here: ``python -m prunekit`` reads this while the working folder is still first on the path, where
any other module could be somebody else's.
"""

from importlib import import_module


def attach(package, file):  # type: ignore[no-untyped-def]  # typing would have to be imported
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package (PEP 562).

    Args:
        package: its name.
        file: its ``__file__``. The list beside it holds lines ``from .room import name as name``, or ``from . import room as
            room``.
    """
    rooms = {}
    with open(file + "i", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("from ."):
                room, _, name = line.removeprefix("from ").partition(" import ")
                name = name.split()[0]
                rooms[name] = (f".{name}", None) if room == "." else (room, name)

    def __getattr__(name):  # type: ignore[no-untyped-def]
        if name not in rooms:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        room, own = rooms[name]
        found = import_module(room, package)
        return found if own is None else getattr(found, own)

    return __getattr__, lambda: [*rooms, "__version__"], [*rooms]
