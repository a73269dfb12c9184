"""FLAP: how much the inputs of the layer that reads a unit fluctuate (An et al. 2023, arXiv 2312.11983).

A channel ``j`` that a layer with weights ``W`` reads scores ``Var(x_j) ‖W_:,j‖²``, the variance over samples and positions (N - 1
below the sum): what is lost with it when its mean is made up for by a bias, which is what ``--compensate`` does. A unit's
score is the sum over the channels that are read from it, in all layers that read them: of a neuron of a Llama ``down_proj``
alone, of a head ``o_proj``. The weights that make a unit do not count. Of whole blocks it says
nothing. A weight's own importance is ``Var(x_j) θ_ij²``.

The paper makes layers comparable by standardising each one's scores: allocation ``standardised``. (Its code standardises channels
before it averages them over a head, ours the heads' sums.) Weights of linear layers and of convolutions, transposed ones too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prunekit.criteria.by_inputs import axes_that_read, scored_by_inputs
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.units import empty_sums


def _flap(evidence: Evidence) -> CriterionResult:
    found = scored_by_inputs(evidence, "flap", _moments, _fluctuation, size=1, power=2)
    sums = empty_sums({name: values.shape for name, values in found.importance.items()})
    for name, axis in axes_that_read(evidence.model, evidence.prunable).items():
        sums[f"{name}@{axis}"][0, 0] = found.importance[name].double().movedim(axis, 0).flatten(1).sum(1)
    return replace(found, axis_sums=sums)


def _moments(rows: Tensor) -> Tensor:
    """Rows ``(groups, rows, d)`` -> their sum, that of their squares, and their number, ``(groups, d, 3)``."""
    total = rows.sum(1)
    return torch.stack([total, rows.square().sum(1), torch.full_like(total, rows.shape[1])], -1)


def _fluctuation(rows: Tensor, moments: Tensor) -> Tensor:
    total, squares, count = moments.unbind(-1)
    variance = ((squares - total.square() / count) / (count - 1).clamp_min(1)).clamp_min(0)
    found: Tensor = rows.square() * variance[:, None]
    return found


CRITERION = Criterion(
    _flap,
    "fluctuation of the inputs that are read from a unit (FLAP, arXiv 2312.11983)",
    needs_data=True,
    by_inputs=True,
    spreads=True,
    group="sum",
    aggregation="l1",
    silent_on=("layers",),  # nothing reads a whole block but the next one
)
