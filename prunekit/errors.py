"""What can go wrong for a user: one line each, which names the thing, its value and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class PrunekitError(Exception):
    """The work could not be done; the command line prints the message and exits with 1."""


class UsageError(PrunekitError):
    """The request itself is wrong (an unknown name, a value out of range); exit code 2."""


class ArtifactError(PrunekitError):
    """A file is missing, truncated, of another kind, or made from other inputs than it is used with."""


class StructureError(PrunekitError):
    """The model cannot take the asked structure; the message names the module."""


class NonFiniteError(PrunekitError):
    """NaN or Inf where numbers are needed."""


class Note(UserWarning):
    """Something that the user should know and that stops nothing; the command line prints it in one line."""


@contextmanager
def theirs(what: str) -> Iterator[None]:
    """Somebody else's code runs inside: what it raises becomes one line that begins with ``what``; our own refusals pass.

    Raises:
        UsageError: ``what`` failed, and how.
    """
    try:
        yield
    except PrunekitError:
        raise
    except Exception as error:  # whatever it raises is its author's to read
        raise UsageError(f"{what} failed: {quoted(error)}") from error


def quoted(error: BaseException, most: int = 200) -> str:
    """What code of somebody else's said when it failed, in one line for the end of a message: ``ValueError: no such key``.

    An import that failed because of another error says that one too, the first of all: transformers tells of a torchvision that
    does not fit torch as of a class of its own that could not be imported.
    """
    first, seen = error, {id(error)}
    while isinstance(error, ImportError) and first.__cause__ is not None and id(first.__cause__) not in seen:
        first = first.__cause__
        seen.add(id(first))
    told = _in_a_line(error, most)
    return told if first is error else f"{told} (from {_in_a_line(first, most)})"


def _in_a_line(error: BaseException, most: int) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}" if text else type(error).__name__


def nearest(name: str, known: list[str]) -> str:
    """A sentence that offers the known names nearest to ``name``, or all of them when none is near."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"


def plain(text: object) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def visible(text: str) -> str:
    """The same for text of several lines, which stay lines."""
    return "\n".join(plain(line) for line in text.split("\n"))


def shortened(text: str, most: int = 1500) -> str:
    """Text from a file can be of any length, a line is for reading: the middle of a longer one is left out."""
    return text if len(text) <= most else f"{text[: most - 500]} … ({len(text):,} characters) … {text[-400:]}"


def check_seed(seed: object) -> None:
    """Raises UsageError for a seed that torch's generators do not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed!r:.40}; it must be a whole number, 0 or more")
