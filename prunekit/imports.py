"""Things that a recipe names by import path: ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit.errors import UsageError, nearest, quoted

EXTRAS = {"PIL": "report", "jinja2": "report", "matplotlib": "report", "sklearn": "digits"}
"""Package that only some need -> the extra of prunekit's that installs it."""
_run_folders: tuple[Path, ...] = ()
_forbidden: str | None = None


def lacking(error: ModuleNotFoundError) -> UsageError | None:
    """What to say where one of ``EXTRAS`` is not installed; None for any other module."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return UsageError(f"this needs {name}, which is not installed; pip install 'prunekit[{EXTRAS[name]}]'")


@contextmanager
def no_code(what: str) -> Iterator[None]:
    """Nothing that is named by an import path is imported inside.

    Args:
        what: runs no code, for the message.
    """
    global _forbidden
    before, _forbidden = _forbidden, what
    try:
        yield
    finally:
        _forbidden = before


def use_working_folder(*runs: Path) -> None:
    """Lets a user's own modules in the working folder be imported, last on the path; never those of run folders.

    A run folder can come from somebody else, and what lies in it must not become code.
    """
    here = Path.cwd().resolve()
    global _run_folders
    _run_folders = tuple(run.resolve() for run in runs)

    def inside(entry: str) -> bool:
        return _in_run_folder(Path(entry or os.curdir).resolve()) is not None

    sys.path[:] = [entry for entry in sys.path if not inside(entry)]
    if not inside(str(here)) and str(here) not in sys.path:
        sys.path.append(str(here))


def is_installed(folder: Path) -> bool:
    """Whether packages found in ``folder`` count as installed: not those of the working folder, nor of a run folder."""
    folder = folder.resolve()
    return folder != Path.cwd().resolve() and _in_run_folder(folder) is None


def _in_run_folder(place: Path) -> Path | None:
    """The run folder that ``place`` is or lies in."""
    return next((run for run in _run_folders if place == run or run in place.parents), None)


def _refuse_run_folder(module_name: str, key: str) -> None:
    """A dotted name can reach into a folder that is not on the path itself (``RUN.module`` from RUN's parent)."""
    if not _run_folders:
        return
    parts = module_name.split(".")
    for count in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:count]))
        if spec is None:
            return
        for place in [spec.origin, *(spec.submodule_search_locations or ())]:
            if place and (run := _in_run_folder(Path(place).resolve())) is not None:
                raise UsageError(f"{key}: {module_name!r} lies in the run folder {run}, whose code is never run")


def load_object(path: str, key: str) -> Any:
    """The object that ``module:name`` names.

    Args:
        key: what asked for it, for the message (such as ``model.factory``).

    Raises:
        UsageError: not of that form, no such module, no such name in it, or the module fails to import.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"{key} is {path!r}; it must look like package.module:name")
    if _forbidden is not None:
        raise UsageError(f"{key}: {path!r} is code, and {_forbidden} runs none")
    try:
        _refuse_run_folder(module_name, key)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{key}: {path!r} cannot be imported: no module {error.name!r} here or installed") from None
    except UsageError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # theirs to read, in one line
        raise UsageError(f"{key}: importing {module_name!r} failed: {quoted(error)}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            where = getattr(module, "__file__", module_name)
            raise UsageError(f"{key}: {where} has no {name!r}; {nearest(name, [n for n in dir(module) if n[0] != '_'])}")
        found = getattr(found, part)
    return found


def call(path: str, key: str, arguments: dict[str, Any]) -> Any:
    """Calls what ``module:name`` names with ``arguments``.

    Raises:
        UsageError: it cannot be imported or called so.
    """
    function = load_object(path, f"{key}.factory")
    if not callable(function):
        raise UsageError(f"{key}.factory: {path!r} is not callable")
    try:
        return function(**arguments)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise lacking(error) or UsageError(f"{key}: {path}(**{arguments}) failed: {quoted(error)}") from error
    except (Exception, SystemExit) as error:  # the user's own function: its error in one line
        raise UsageError(f"{key}: {path}(**{arguments}) failed: {quoted(error)}") from error
