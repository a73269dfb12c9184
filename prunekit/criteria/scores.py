"""What a criterion found: an importance per weight, and signed sums that give any group its exact score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.artifact import conform
from prunekit.criteria.group_scores import GROUPINGS
from prunekit.errors import ArtifactError, NonFiniteError
from prunekit.structure.joined import parts_of

SCHEMA = 1
PART = re.compile(r"part\d+\|")


def summed_axes(rank: int) -> range:
    """Axes of a parameter along which signed sums are kept: outputs and inputs, and experts before them (of three axes, all)."""
    return range(3 if rank == 3 else min(2, rank))


def unsuited(criterion: str, of: str | None, silent_on: Sequence[str], structure: str) -> str | None:
    """Why units of ``structure`` are not ranked by a criterion; None where they are.

    Args:
        of: the one structure whose units it scores; None where it scores weights.
        silent_on: structures of whose units it says nothing.
    """
    if of not in (None, structure):
        return f"scores of {criterion} are of {of}, and the structure is {structure}; prune {of}, or take a criterion of weights"
    nothing = next((part for part in parts_of(structure) if part in silent_on), None)
    if nothing is not None:
        return f"{criterion} says nothing of {nothing}, and the structure is {structure}; take another criterion"
    return None


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
        cost: seconds, peak memory and ``gradient_evaluations`` (one target of one sample at one point of the path); those
            of a composed criterion include its parts'; not part of the digest.
        parts: whole scores that groups are computed from, for composed criteria and a few others: their tensors lie in
            the file as ``part<k>|<tensor>``, ``part<k>|part<l>|<tensor>`` for parts of parts.
    """

    importance: dict[str, Tensor]
    axis_sums: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Scores, ...] = ()

    @property
    def criterion(self) -> str:
        return str(self.provenance["criterion"])

    @cached_property
    def digest(self) -> str:
        """Identifies tensors and provenance; the same for a repeated run."""
        inside = {"parts": [part.digest for part in self.parts]} if self.parts else {}
        facts = {**self.provenance, "findings": self.findings, **inside}
        return checkpoint.digest({**self.importance, **self.axis_sums}, facts)

    @property
    def every_provenance(self) -> list[dict[str, Any]]:
        """These scores' provenance, and that of all that they are composed of."""
        return [self.provenance, *(found for part in self.parts for found in part.every_provenance)]

    @property
    def structure(self) -> str | None:
        """The one structure that the scores, or those that they are composed of, are of; None where they are of weights."""
        return next((found["structure"] for found in self.every_provenance if found.get("structure")), None)

    def unsuited(self, structure: str) -> str | None:
        """Why units of a structure (or of joined ones) are not ranked by these scores; None where they are."""
        silent = [name for found in self.every_provenance for name in found.get("silent_on", ())]
        return unsuited(self.criterion, self.structure, silent, structure)

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
        """Importance of every channel of one group, ``(channels,)``; see ``groups``."""
        return self.groups({"": members})[""]

    def groups(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Importance of every channel of every group, ``group name -> (channels,)``, comparable across groups.

        Args:
            groups: group name -> ``<param>@<axis>`` -> ``(channels, block)``, the indices on that axis that belong to a
                channel.

        How is the criterion's choice, see ``prunekit.criteria.group_scores.GROUPINGS``: for additive criteria the exact signed
        sum per sample and target, aggregated as single weights are; for composed ones the composition of the parts' group
        scores.

        Raises:
            ArtifactError: the file holds none of a group's members.
        """
        return GROUPINGS[self.provenance["group"]](self, groups)

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
        header = {"kind": "scores", "schema": SCHEMA, **self._header()}
        checkpoint.write_tensors(Path(path), self._tensors(), header)

    def _header(self) -> dict[str, Any]:
        header = {"provenance": self.provenance, "findings": self.findings, "digest": self.digest, "cost": self.cost}
        return header | ({"parts": [part._header() for part in self.parts]} if self.parts else {})

    def _tensors(self) -> dict[str, Tensor]:
        found = {**self.importance, **self.axis_sums}
        taken = {tensor.data_ptr() for tensor in found.values()}
        for k, part in enumerate(self.parts):
            for name, tensor in part._tensors().items():
                shared = tensor.data_ptr() in taken  # a part used twice: a safetensors file holds every tensor for itself
                found[f"part{k}|{name}"] = tensor.clone() if shared else tensor
                taken.add(tensor.data_ptr())
        return found

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
            for each in (header, *header.get("parts", ())):
                conform(each["cost"], dict[str, float], "cost")
                conform(each["findings"], dict[str, Any], "findings")
            return cls._of(header, tensors, path)

    @classmethod
    def _of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Scores:
        names = set(header["provenance"]["prunable"])
        own = {key: tensor for key, tensor in tensors.items() if not PART.match(key)}
        parts = []
        for k, inner in enumerate(header.get("parts", ())):
            prefix = f"part{k}|"
            parts.append(cls._of(inner, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, path))
        scores = cls(
            {k: v for k, v in own.items() if k in names},
            {k: v for k, v in own.items() if k not in names},
            header["provenance"],
            header["findings"],
            header["cost"],
            tuple(parts),
        )
        scores.check()
        if scores.digest != header["digest"]:
            raise ArtifactError(f"{path}: content does not match its digest {header['digest']}; it was changed")
        return scores
