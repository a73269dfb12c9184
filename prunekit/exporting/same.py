"""Whether what was read back computes what was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import batch
from prunekit.batch import Inputs
from prunekit.errors import ArtifactError
from prunekit.measure.undisturbed import placed, undisturbed


@torch.no_grad()
def answered(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every tensor of the model's answer, in evaluation mode."""
    with undisturbed(model):
        return batch.answers(batch.called(model, placed(model, inputs)))


def compare(found: Sequence[Any], expected: Sequence[Tensor], tolerance: float, what: str) -> float:
    """The largest difference of two answers, as a share of one and the largest number of the expected tensor.

    Raises:
        ArtifactError: it is above ``tolerance``, or they have other shapes; begins with ``what``.
    """
    if [tuple(one.shape) for one in found] != [tuple(one.shape) for one in expected]:
        raise ArtifactError(f"{what}: its answers have other shapes than the pruned model's; nothing was written")
    worst = 0.0
    for now, before in zip((torch.as_tensor(one) for one in found), expected, strict=True):
        if before.numel() == 0:
            continue
        now, before = now.double(), before.double()
        same = (now == before) | (now.isnan() & before.isnan())
        off = float(torch.where(same, 0.0, (now - before).abs()).max())
        most = float(before[before.isfinite()].abs().max()) if before.isfinite().any() else 0.0
        worst = max(worst, off / (1 + most)) if off == off else float("inf")
    if not worst <= tolerance:
        raise ArtifactError(
            f"{what}: its answers differ from the pruned model's by {worst:.3g} of their size, {tolerance:g} is allowed; "
            "nothing was written"
        )
    return worst


def rounding(model: nn.Module, exact: float) -> float:
    """What answers of another program may differ by: ``exact``, or what the model's own type resolves, times ten."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max([exact, *(10 * torch.finfo(each).eps for each in types if torch.finfo(each).bits < 32)])
