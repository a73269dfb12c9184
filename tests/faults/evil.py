"""What a stranger's file may name: nothing may import it. Where it is imported, it says so."""

import os
from pathlib import Path

if "PRUNEKIT_EVIL" in os.environ:
    Path(os.environ["PRUNEKIT_EVIL"]).touch()


def build(*_arguments: object, **_options: object) -> None:
    """Stands for a factory, a task, a criterion."""
