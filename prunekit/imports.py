"""Things that a recipe names by import path: ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from prunekit.errors import UsageError, nearest, quoted
from prunekit.links import refuse_links_out

EXTRAS = {
    "PIL": "report", "accelerate": "hf", "dask": "dask", "datasets": "hf", "distributed": "dask", "jinja2": "report",
    "lightning": "lightning", "lm_eval": "lm-eval", "matplotlib": "report", "onnx": "onnx", "onnxruntime": "onnx",
    "onnxscript": "onnx", "scipy": "report", "sklearn": "digits", "soundfile": "hf", "tokenizers": "hf",
    "transformers": "hf",
}  # fmt: skip
"""Package that only some need -> the extra of prunekit's that installs it."""
IMPORT_PATH = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
"""``package.module:name``, or ``package.module:Class.name``. Nothing else is imported, and ``prunekit.trust`` looks for these."""
_run_folders: tuple[Path, ...] = ()
_forbidden: str | None = None


def lacking(error: ModuleNotFoundError) -> UsageError | None:
    """What to say where one of ``EXTRAS`` is not installed; None for any other module."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    return UsageError(f"this needs {name}, which is not installed; pip install 'prunekit[{EXTRAS[name]}]'")


def needed(name: str) -> ModuleType:
    """A package of ``EXTRAS``, imported.

    Raises:
        UsageError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise lacking(error) or error from None


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

    Raises:
        ArtifactError: a link leads out of one of them, see ``prunekit.links``.
    """
    here = Path.cwd().resolve()
    global _run_folders
    _run_folders = tuple(Path(os.path.realpath(run)) for run in runs)
    for run in runs:
        refuse_links_out(run)
    if _Guard not in sys.meta_path:
        sys.meta_path.insert(0, _Guard)

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


class _InRunFolder(ModuleNotFoundError):
    """A module would come from a run folder."""

    def __init__(self, name: str, run: Path) -> None:
        super().__init__(f"{name} lies in the run folder {run}", name=name)
        self.run = run


class _Guard:
    """Stands before Python's own finders, so that no import of anybody's, libraries' optional ones too, ends in a run folder."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if not _run_folders or name.partition(".")[0] == "prunekit":
            return
        spec = PathFinder.find_spec(name, path, target)
        for place in () if spec is None else (spec.origin, *(spec.submodule_search_locations or ())):
            if place and (run := _in_run_folder(_resolved(place))) is not None:
                raise _InRunFolder(name, run)


def _resolved(place: str) -> Path:
    """``Path.resolve``, which asks about every folder on the way, done once a folder: hundreds of modules lie in few."""
    folder, name = os.path.split(place)
    return Path(os.path.realpath(place)) if os.path.islink(place) else Path(_real_folder(folder), name)


_real_folder = cache(os.path.realpath)


def load_object(path: str, key: str) -> Any:
    """The object that ``module:name`` names.

    Args:
        key: what asked for it, for the message (such as ``model.factory``).

    Raises:
        UsageError: not of that form, no such module, no such name in it, or the module fails to import.
    """
    module_name, _, name = path.partition(":")
    if re.fullmatch(IMPORT_PATH, path) is None:
        raise UsageError(f"{key} is {path!r}; it must look like package.module:name")
    if _forbidden is not None:
        raise UsageError(f"{key}: {path!r} is code, and {_forbidden} runs none")
    try:
        module = importlib.import_module(module_name)
    except _InRunFolder as error:
        raise UsageError(f"{key}: {module_name!r} lies in the run folder {error.run}, whose code is never run") from None
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
