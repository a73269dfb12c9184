"""Reports without their pictures, whose drawing takes most of a report's time, for tests that look at other things."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO
from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@cache
def blank() -> bytes:
    """The smallest PNG."""
    made = io.BytesIO()
    Figure(figsize=(0.1, 0.1)).savefig(made)
    return made.getvalue()


@contextmanager
def undrawn() -> Iterator[None]:
    """Figures are made as ever; in the place of each a blank PNG is written."""
    nothing = blank()

    def print_png(_canvas: FigureCanvasAgg, target: Path | BinaryIO, **_: object) -> None:
        if isinstance(target, Path):
            target.write_bytes(nothing)
        else:
            target.write(nothing)

    with mock.patch.object(FigureCanvasAgg, "print_png", print_png):
        yield
