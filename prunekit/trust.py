"""Whose code may run: what a recipe inside a run folder names is imported only where this user made that run, or trusts it.

A recipe on the command line is the user's word. A run folder may come from anybody, so its recipe is data: before any of its
import paths is followed, they must be known here. What is known is kept per user and machine as a keyed hash (HMAC-SHA256) of the
recipe and of the files that its paths lead to, so that neither an edited recipe nor another module of the same name passes for
what was trusted. Moving a folder changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib
import importlib.util
import json
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import UsageError, plain, quoted
from prunekit.imports import IMPORT_PATH

OF_FILES = ("files", "tokenizer", "text", "label", "image", "audio", "join", "classes", "subset")
DATA = ("model.pretrained", *(f"data.{key}" for key in OF_FILES))
"""Keys whose text names files and columns, and is never imported, whatever it looks like."""
BUILT_IN = ("prunekit.models", "prunekit.data")
"""Modules whose offered names (``__all__``) any recipe may use."""
PATH = re.compile(IMPORT_PATH)
"""Also inside a composed criterion. Whatever could be imported matches it, since ``load_object`` takes nothing else."""
Facts = Mapping[str, Any] | list[dict[str, Any]]
"""Provenance, of one thing or of all that it is composed of."""
NOWHERE = "not found"
STATE = "PRUNEKIT_STATE"
"""Environment variable: the folder that keeps what is trusted, where the usual one will not do."""

_here: set[str] = set()
"""What this process has kept, wherever it could."""
_OF_THIS_PROCESS = secrets.token_bytes(32)
"""The key where none can be kept."""


@dataclass(frozen=True)
class Named:
    """One import path of a recipe: at which ``key`` it stands, and the ``file`` or package that its module comes from."""

    key: str
    path: str
    file: str


def imports_of(recipe: Mapping[str, Any]) -> list[Named]:
    """Every import path that a recipe's content names, built-in factories left out. Nothing is imported."""
    return [Named(key, path, _file(path)) for key, path in dict.fromkeys(_paths(recipe, ""))]


def check(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Refuses a run folder whose recipe names code that is not known to be this user's.

    A path that leads nowhere is left to fail where it is followed.

    Args:
        recipe: the content of its recipe.yaml, which is then worked with: a file may be another when it is read again.

    Raises:
        UsageError: names what would be imported, from where, and what to do.
    """
    unknown = [one for one in imports_of(recipe) if one.file != NOWHERE and not _exists(_mark(recipe, one))]
    if not unknown:
        return
    shown = ", ".join(f"{one.key}: {one.path} ({one.file})" for one in unknown[:3]) + (" …" if len(unknown) > 3 else "")
    raise UsageError(
        f"{plain(folder)}: this run is not known as yours, and its recipe names code that would run: {plain(shown)}; look at it, "
        f"and let it with prunekit trust {shlex.quote(str(folder))}"
    )


def remember(folder: Path, recipe: Mapping[str, Any]) -> str | None:
    """From now on the folder's recipe may import what it names, from where it does now; says why that cannot be kept.

    In this process it may in any case.
    """
    why = None
    for one in imports_of(recipe):
        try:
            _keep(_mark(recipe, one))
        except OSError as error:
            why = f"{quoted(error)}; set {STATE} to a folder of yours, or later commands ask for prunekit trust {folder}"
    return why


def check_file(recipe: Mapping[str, Any], file: Path, facts: Facts) -> None:
    """Refuses a score or plan file whose facts name code: a criterion, target or structure by import path.

    Known are paths of the run's recipe, which ``check`` has let pass, and those that this user has worked with (``used``).

    Raises:
        UsageError: names the path and what to do.
    """
    named = [one for one in _named_in(facts) if one.file != NOWHERE]
    own = {path for _, path in _paths(recipe, "")} if named else set()
    for one in named:
        if one.path not in own and not _exists(_mark({}, one)):
            raise UsageError(
                f"{plain(file)}: names code that neither you nor the run's recipe named here, {plain(one.path)} "
                f"({plain(one.file)}); score or plan with it yourself, or remove that file"
            )


def used(facts: Facts) -> None:
    """From now on files may name the criteria, targets and structures of these facts: this user has just worked with them."""
    for one in _named_in(facts):
        with contextlib.suppress(OSError):  # then later commands refuse, and say so
            _keep(_mark({}, one))


def _named_in(facts: Facts) -> list[Named]:
    found: dict[str, None] = {}

    def look(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                look(inner, str(name))
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner, key)
        elif key in ("criterion", "target", "structure"):
            found.update((path, None) for _, path in _paths(value, key))

    look(facts, "")
    return [Named("file", path, _file(path)) for path in found]


def _exists(mark: str) -> bool:
    with contextlib.suppress(OSError):
        return mark in _here or (_known() / mark).exists()
    return False


def _keep(mark: str) -> None:
    _here.add(mark)
    place = _known() / mark
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()


def _paths(content: Any, key: str) -> Iterator[tuple[str, str]]:
    """``(key, module:name)`` of every text in a nest that holds an import path, also inside a composed criterion."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _paths(str(name), key)
            inner = f"{key}.{name}" if key else str(name)
            yield from () if inner in DATA else _paths(value, inner)
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value, key)
    elif isinstance(content, str):
        for path in PATH.findall(content):
            if not _built_in(path):
                yield key, path


def _built_in(path: str) -> bool:
    module, _, name = path.partition(":")
    return module in BUILT_IN and name in importlib.import_module(module).__all__


def _file(path: str) -> str:
    """Where the module's outermost package would come from; looking for it runs nothing."""
    top = path.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return NOWHERE
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    place = next((p for p in places if p and os.path.exists(p)), None)
    return str(Path(place).resolve()) if place else str(spec.origin)


def _mark(recipe: Mapping[str, Any], one: Named) -> str:
    """The keyed hash of what the recipe says, and of where one of its paths leads."""
    told = {"recipe": recipe, "key": one.key, "path": one.path, "file": one.file}
    try:
        key = _key()
    except OSError:
        key = _OF_THIS_PROCESS
    return hmac.new(key, json.dumps(told, sort_keys=True, default=str).encode(), hashlib.sha256).hexdigest()


def state() -> Path:
    """The folder where prunekit keeps what is between commands: this user's, on this machine.

    Raises:
        OSError: the user has no home, and names none.
    """
    if given := os.environ.get(STATE):
        return Path(given)
    if local := os.environ.get("LOCALAPPDATA"):
        return Path(local) / "prunekit"
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given) / "prunekit"
    try:
        return Path.home() / ".local" / "state" / "prunekit"
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from None


def _known() -> Path:
    return state() / "trusted"


def _key() -> bytes:
    """This user's secret on this machine, made when it is first needed."""
    path = state() / "key"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        made = path.with_name(f".key-{secrets.token_hex(8)}")
        handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(made, path)  # whole from the beginning, and the first one of several processes wins
        except FileExistsError:
            pass
        finally:
            made.unlink()
    key = path.read_bytes()
    if len(key) != 32:
        raise OSError(f"{path} is no key of 32 bytes; remove it, and trust your runs again")
    return key
