"""What a criterion found: an importance per weight, and signed sums that give any group its exact score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.errors import ArtifactError, NonFiniteError

SCHEMA = 1


def _l1(signed: Tensor) -> Tensor:
    return signed.abs().sum((0, 1))


def _mean(signed: Tensor) -> Tensor:
    return signed.mean((0, 1)).abs()


def _l2(signed: Tensor) -> Tensor:
    return signed.square().sum((0, 1)).sqrt()


AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {"l1": _l1, "l2": _l2, "mean": _mean}
"""``(samples, targets, ...) -> (...)``: how signed scores become one importance."""


@dataclass(frozen=True)
class Scores:
    """Importance of every prunable weight.

    Attributes:
        importance: by parameter name, its shape, non-negative.
        axis_sums: for additive criteria, ``<param>@<axis>`` -> signed scores summed to that axis,
            ``(samples, targets, axis size)``; biases are there too, since they leave with their channel.
        provenance: what the scores were made from; part of the digest.
        findings: what is known of them: ``error`` (see ``prunekit.kernel.score_error``), and ``uncovered``, how many
            weights of a parameter no scoring sample touched; part of the digest.
        cost: seconds and peak memory; not part of the digest.
    """

    importance: dict[str, Tensor]
    axis_sums: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def criterion(self) -> str:
        return str(self.provenance["criterion"])

    @cached_property
    def digest(self) -> str:
        """Identifies tensors and provenance; the same for a repeated run."""
        return checkpoint.digest({**self.importance, **self.axis_sums}, {**self.provenance, "findings": self.findings})

    def check(self) -> None:
        """Refuses what no plan can be made of.

        Raises:
            NonFiniteError: NaN or Inf; names the parameter.
            ArtifactError: a negative importance.
        """
        for name, tensor in {**self.importance, **self.axis_sums}.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"scores of {self.criterion}: {name} holds NaN or Inf")
        for name, tensor in self.importance.items():
            if tensor.numel() and tensor.min() < 0:
                raise ArtifactError(f"scores of {self.criterion}: {name} has a negative importance")

    def group(self, members: Mapping[str, Tensor]) -> Tensor:
        """Importance of every channel of a group, ``(channels,)``.

        Args:
            members: ``<param>@<axis>`` -> ``(channels, block)``, the indices on that axis that belong to a channel.

        For additive criteria the signed scores are summed inside the group per sample and target, then
        aggregated as single weights are: exact, cancellation inside the group included. Otherwise the L2 norm of
        the importances; for ``random`` one draw a channel.
        """
        how = self.provenance["group"]
        if how == "sum":
            return AGGREGATIONS[self.provenance["aggregation"]](self.signed(members))
        total: Tensor | None = None
        for key, index in members.items():
            name, axis = key.rsplit("@", 1)
            if name in self.importance:
                rows = self.importance[name].movedim(int(axis), 0)[index].flatten(1)
                part = rows[:, 0] if how == "draw" else rows.square().sum(1)
                total = part if total is None else total if how == "draw" else total + part
        if total is None:
            raise ArtifactError(f"scores of {self.criterion}: hold none of {', '.join(members)}")
        return total if how == "draw" else total.sqrt()

    def signed(self, members: Mapping[str, Tensor]) -> Tensor:
        """Exact signed scores of groups, ``(samples, targets, groups)``; additive criteria only.

        A channel's, an attention head's (``{"q.weight@0": torch.arange(heads * size).view(heads, size)}``) or any other
        group of slices: see ``group`` for ``members``. Classes are a choice of samples or of targets from the result.

        Raises:
            ArtifactError: the file holds no signed sums, or none of a member.
        """
        total: Tensor | None = None
        for key, index in members.items():
            if key not in self.axis_sums:
                if key.rsplit("@", 1)[0] in self.importance or not self.axis_sums:
                    raise ArtifactError(f"scores of {self.criterion}: lack {key}, which a group needs")
                continue
            part = self.axis_sums[key][..., index].sum(-1)
            total = part if total is None else total + part
        if total is None:
            raise ArtifactError(f"scores of {self.criterion}: hold none of {', '.join(members)}")
        return total

    def by_layer(self) -> dict[str, Tensor]:
        """Exact signed scores of whole layers, biases included: ``layer -> (samples, targets)``."""
        layers: dict[str, Tensor] = {}
        for key, sums in self.axis_sums.items():
            if key.endswith("@0"):
                layer = key[:-2].rpartition(".")[0] or key[:-2]
                layers[layer] = layers[layer] + sums.sum(2) if layer in layers else sums.sum(2)
        return layers

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; provenance, digest and cost are inside its metadata."""
        self.check()
        header = {
            "kind": "scores",
            "schema": SCHEMA,
            "provenance": self.provenance,
            "findings": self.findings,
            "digest": self.digest,
            "cost": self.cost,
        }
        checkpoint.write_tensors(Path(path), {**self.importance, **self.axis_sums}, header)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads a score file.

        Raises:
            ArtifactError: not a score file, truncated, or its content does not match its digest.
            NonFiniteError: NaN or Inf inside.
        """
        path = Path(path)
        header = checkpoint.read_header(path, "scores")
        tensors = checkpoint.read_tensors(path)
        with checkpoint.reading(path, "score file"):
            if header["schema"] != SCHEMA:
                raise ArtifactError(f"{path}: schema {header['schema']}, this prunekit reads {SCHEMA}")
            names = set(header["provenance"]["prunable"])
            scores = cls(
                {k: v for k, v in tensors.items() if k in names},
                {k: v for k, v in tensors.items() if k not in names},
                header["provenance"],
                header["findings"],
                header["cost"],
            )
            scores.check()
            digest = header["digest"]
        if scores.digest != digest:
            raise ArtifactError(f"{path}: content does not match its digest {digest}; it was changed")
        return scores
