"""Taylor, first order: ``|θ · ∂L/∂θ|`` of the mean loss (Molchanov et al. 2019, arXiv 1906.10771).

It is the attribution of the straight segment from θ to 0 with one node at its beginning, so it is computed by the
same code as influence and its group scores are exact sums as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prunekit.criteria.additive import collect
from prunekit.criteria.evidence import Criterion, Evidence, Found
from prunekit.kernel import Contribution, attribute, from_loss
from prunekit.progress import Bar
from prunekit.trajectory import Segment


def _taylor(evidence: Evidence) -> Found:
    x, y = evidence.samples()
    theta = evidence.state
    to_zero = Segment(0, theta, torch.zeros_like(theta), torch.zeros_like(theta))

    def parts(skip: int) -> Iterator[Contribution]:
        with Bar("taylor (samples)", len(x)) as bar:
            yield from attribute(
                evidence.function(from_loss(evidence.loss)),
                lambda: [to_zero],
                x,
                y,
                rule="left",
                memory=evidence.memory,
                skip=skip,
                tick=bar.advance,
            )

    return Found(*collect(parts, (len(x), 1), evidence.prunable, "mean"))


CRITERION = Criterion(
    _taylor, "first-order change of the mean loss (arXiv 1906.10771)", needs_data=True, group="sum", aggregation="mean"
)
