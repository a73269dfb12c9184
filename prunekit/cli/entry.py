"""The entry point: exit codes, and one line for an error."""

from __future__ import annotations

import copy
import io
import os
import sys
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

import typer

from prunekit import ranks, stopping
from prunekit.bounded import DIGITS, LONG_NUMBER
from prunekit.cli.top import app
from prunekit.cli.verb import SHARED
from prunekit.errors import Note, PrunekitError, UsageError, plain, shortened


def main() -> None:
    """Entry point: exit code 0, 1 (failed), 2 (wrong use), 130 or 143 (a signal); one line on stderr for an error."""
    debug = bool(os.environ.get("PRUNEKIT_DEBUG"))
    stopping.tells = ranks.tells
    if not debug and ranks.asked():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch.distributed says of its own is for its makers
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
        if any(LONG_NUMBER.search(argument) for argument in sys.argv[1:]):
            raise UsageError(f"an argument holds a number of more than {DIGITS} digits")
        with stopping.raised(), _ranks(sys.argv[1:]):
            code = _needed(sys.argv[1:])(standalone_mode=False)
            sys.stdout.flush()
    except typer.TyperException as error:
        _fail(error.format_message() + _given(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        sys.exit(1)
    except typer.Abort:
        _stop("interrupted", 130)
    except (KeyboardInterrupt, stopping.Terminated, Exception) as error:
        if stopped := stopping.told(error):
            _stop(*stopped)
        if debug:
            raise
        _fail(*_told(error))
    if code == 130:  # the parser turns Ctrl-C into a code and says nothing
        _stop("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _needed(arguments: list[str]) -> typer.Typer:
    """The command line with the verb that is called alone, where one is: making the parsers of all takes longer than it does."""
    called = _called(arguments)
    one = copy.copy(app)
    one.registered_commands = [command for command in app.registered_commands if command.name == called]
    return one if one.registered_commands else app


def _called(arguments: list[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _ranks(arguments: list[str]) -> AbstractContextManager[None]:
    """The ranks as one, where torchrun started several; a verb that has nothing to share refuses."""
    if not ranks.asked() or {"--help", "-h", "--version"} & set(arguments):
        return nullcontext()
    called = _called(arguments)
    if called in SHARED:
        return ranks.joined()
    if called in {command.name for command in app.registered_commands}:
        raise UsageError(f"{called} works in one process, it has nothing to share; start it without torchrun")
    return nullcontext()


def _note(message: Warning | str, *where: object) -> None:
    if ranks.first():
        print(f"prunekit: note: {_one_line(str(message))}", file=sys.stderr)


def _told(error: BaseException) -> tuple[str, int]:
    """The line for an error, and the exit code."""
    if isinstance(error, ModuleNotFoundError):
        from prunekit.imports import lacking

        error = lacking(error) or error
    if isinstance(error, PrunekitError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", 1
    if isinstance(error, MemoryError):
        return "not enough memory for this", 1
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__}: {error} (at {where}; PRUNEKIT_DEBUG=1 shows the whole traceback)", 1


def _stop(line: str, code: int) -> NoReturn:
    sys.stderr.flush()
    if ranks.tells(code):
        stopping.say(line)
    _end(code)


def _fail(message: str, code: int) -> NoReturn:
    if ranks.tells(code):
        team = ranks.met()
        where = f"rank {team.rank}: " if team is not None and team.rank else ""
        print(f"prunekit: {where}{_one_line(message)}", file=sys.stderr)
    _end(code)


def _one_line(message: str) -> str:
    return shortened(plain(" ".join(message.split())))


def _end(code: int) -> NoReturn:
    if ranks.met() is not None:
        stopping.end(code)  # what the others wait for never comes; torchrun ends them
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
