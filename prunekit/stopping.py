"""What SIGINT and SIGTERM mean to the program: one line on stderr and exit code 130 or 143, at whatever moment they come.

While a verb works they are raised, so that everything is put away on the way out. Before it begins, after it has ended and while
modules are being imported there is nothing to put away, and much that would answer an exception with a traceback or swallow it:
there the process ends at once. Only the program does this (``prunekit.start``); a library leaves signals to its user.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself takes as long to import as all else here, and nobody listens yet
    from typing import Any, NoReturn

SAID = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
"""What the line says, and the exit code."""
SHOW_CURSOR = b"\x1b[?25h"


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no error, so that nothing on the way takes it for one."""


class Interrupted(KeyboardInterrupt):
    """SIGINT came. Python ends a process by the signal itself, and so with another code, if its own class passed an ``exec``."""


RAISED: dict[int, type[BaseException]] = {signal.SIGINT: Interrupted, signal.SIGTERM: Terminated}
COMES_OF: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def _alone_or_first(code: int) -> bool:
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") in ("", "1")


tells: Callable[[int], bool] = _alone_or_first
"""Whether this process says why it ends with such a code; where several work as one another one may have said it
(``prunekit.ranks.tells``)."""

_endings: list[Callable[[], None]] = []


def before_the_end(put_away: Callable[[], None]) -> None:
    """Has a function called where the process ends at once, without Python's own exit functions."""
    _endings.append(put_away)


def end(code: int) -> NoReturn:
    """Ends the process at once, other threads and whatever they wait for included."""
    for put_away in _endings:
        with suppress(Exception):  # the process ends, whatever could not be put away
            put_away()
    os._exit(code)


_owner = 0
"""The process that this is for; one that it forks has these handlers too, and no use for them."""
_raising = False
_unsaid = [True]
"""Holds something until a line was chosen: taking it out is one step, which no second signal can come between."""
_written = False


def listen() -> None:
    """From now on SIGINT and SIGTERM end this process as the first line says; what it was started to ignore stays ignored."""
    global _owner
    _owner = os.getpid()
    atexit.register(_ignore)  # the first one to be registered runs last
    sys.unraisablehook = _unraisable
    for signum in SAID:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _handle)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, a signal is raised in the main thread: KeyboardInterrupt or ``Terminated``."""
    global _raising
    _raising = True
    try:
        yield
    finally:
        _raising = False


def end_with_parent() -> None:
    """Lets this process of multiprocessing's end as soon as its parent has ended, be it killed.

    For workers whose files are written whole or not at all, and whose locks go with the process: there is nothing to put away.
    """
    import multiprocessing
    import threading

    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()  # on a pipe whose other end the parent alone holds
        end(1)

    threading.Thread(target=wait, daemon=True).start()


def told(error: BaseException | None) -> tuple[str, int] | None:
    """What to say and the exit code, where an error came of a signal: is it, or was raised while one was answered."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        for signum, kind in COMES_OF.items():
            if isinstance(error, kind):
                return SAID[signal.Signals(signum)]
        seen.add(id(error))
        error = error.__context__
    return None


def say(line: str) -> bool:
    """Writes the line on stderr, unless another signal has chosen one; whether a line is out by now."""
    global _written
    if os.getpid() != _owner:  # called by a program that keeps its signals to itself
        print(f"prunekit: {line}", file=sys.stderr)
        return True
    try:
        _unsaid.pop()
    except IndexError:
        return _written
    try:
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
        os.write(2, f"prunekit: {line}\n".encode())
    except OSError:  # nobody reads it
        pass
    _written = True
    return True


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _owner:
        signal.signal(signum, signal.SIG_DFL)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signum)
    elif _raising and not _importing(frame):
        raise RAISED[signum]
    else:
        _leave(signum)


def _leave(signum: int) -> None:
    line, code = SAID[signal.Signals(signum)]
    if not tells(code):
        end(code)
    if say(line):  # else this signal came between another one and its line, which ends the process
        end(code)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: an exception there can be swallowed, or leave a half-made library behind."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: Any) -> None:
    """A signal that was raised inside a destructor, where Python prints what is raised and goes on."""
    for signum, kind in COMES_OF.items():
        if isinstance(unraisable.exc_value, kind):
            _leave(signum)
    sys.__unraisablehook__(unraisable)


def _ignore() -> None:
    """The last thing that an ending program does in Python: by now all is written, and said."""
    for signum in SAID:
        signal.signal(signum, signal.SIG_IGN)
