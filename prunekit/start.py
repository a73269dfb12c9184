"""How the program begins: what a signal means first, then the command line, whose imports take a while."""

import sys

from prunekit import stopping


def main() -> None:
    """Entry point of the ``prunekit`` command, of ``python -m prunekit`` and of a checkout's ``cli.py``."""
    stopping.listen()
    try:
        from prunekit.cli import main as command_line
    except ModuleNotFoundError as error:
        sys.exit(f"prunekit: {error.name} is not installed here; use .venv/bin/python (make demo makes it)")
    command_line()
