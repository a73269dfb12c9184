"""The entry point: exit codes, and one line for an error."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from pathlib import Path

import typer

from prunekit.cli.top import app
from prunekit.errors import Note, PrunekitError, UsageError
from prunekit.imports import lacking


def main() -> None:
    """Entry point: exit code 0, 1 (failed), 2 (wrong use), 130 (interrupted); one line on stderr for an error."""
    debug = bool(os.environ.get("PRUNEKIT_DEBUG"))
    if not debug:
        warnings.simplefilter("ignore")  # of the libraries underneath; what a user must know is said in our own words
        warnings.simplefilter("default", Note)
        warnings.showwarning = _note  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    try:
        if "" in sys.argv[1:]:
            raise UsageError("an argument is empty")
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        _fail(error.format_message() + _given(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            error = lacking(error) or error
        if isinstance(error, PrunekitError):
            _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        _fail(f"{type(error).__name__}: {error} (at {where}; PRUNEKIT_DEBUG=1 shows the whole traceback)", 1)
    if code == 130:  # the parser turns Ctrl-C into a code and says nothing
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _note(message: Warning | str, *where: object) -> None:
    print(f"prunekit: note: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    print(f"prunekit: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # stdout itself is what failed: the interpreter must not try again while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _given(error: typer.TyperException) -> str:
    """The value that an option was given, which the parser's message leaves out."""
    options = getattr(getattr(error, "param", None), "opts", ())
    for option, value in zip(sys.argv, sys.argv[1:], strict=False):
        if option in options:
            return f" (given: {value})"
    return ""
