"""Lets torchvision be imported where its compiled operators cannot load (another build of torch, no such wheel).

torchvision registers what two of its operators compute for tensors without data as it is imported, and fails if nobody has
declared them. None of the zoo's models calls them. Where the real operators exist, loading them declares the same schemas
once more, which torch refuses; so they are declared only after torchvision's own library was tried.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []  # a library's declarations last as long as it does


def declare() -> None:
    """Declares ``torchvision::nms`` and ``torchvision::qnms`` unless torchvision's own operators can be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _kept:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue  # built for another torch: its operators are not there
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _kept.append(library)
