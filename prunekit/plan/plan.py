"""What stays and what goes: a plan, which can be looked at and edited before it is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import checkpoint
from prunekit.errors import ArtifactError

SCHEMA = 1
KEEP, INDEX = "keep/", "index/"


@dataclass(frozen=True)
class Plan:
    """A decision for every prunable weight.

    Attributes:
        structure: ``"unstructured"`` or ``"channels"``.
        keep: True where something stays. Unstructured: by parameter name, its shape. Channels: by group name,
            ``(channels,)``.
        index: for channels, ``<group>|<param>@<axis>`` -> ``(channels, block)``: what leaves with each channel.
        shapes: of every parameter and buffer of the dense model.
        provenance: scores, model, criterion, allocation, sparsity asked for, prunable parameters, whether edited.
    """

    structure: str
    keep: dict[str, Tensor]
    index: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Identifies decision and provenance."""
        return checkpoint.digest({**self.keep, **self.index}, {"structure": self.structure, **self.provenance})

    @property
    def history(self) -> list[dict[str, Any]]:
        """What ``refine`` did, round by round; empty for a plan that was not refined."""
        return list(self.provenance.get("refine", {}).get("history", []))

    def kept_indices(self) -> dict[str, Tensor]:
        """``<param>@<axis>`` -> kept indices on that axis, ascending; only axes that lose something."""
        kept: dict[str, Tensor] = {}
        for key, index in self.index.items():
            group, member = key.split("|")
            removed = index[~self.keep[group]].flatten()
            if len(removed):
                name, axis = member.rsplit("@", 1)
                stays = kept.get(member, torch.arange(self.shapes[name][int(axis)]))
                kept[member] = stays[~torch.isin(stays, removed)]
        return kept

    def masks(self) -> dict[str, Tensor]:
        """Dense boolean masks, True where a weight stays, of every parameter or buffer that the plan touches."""
        if self.structure == "unstructured":
            return dict(self.keep)
        masks: dict[str, Tensor] = {}
        for member, kept in self.kept_indices().items():
            name, axis = member.rsplit("@", 1)
            shape = self.shapes[name]
            along = torch.zeros(shape[int(axis)], dtype=torch.bool)
            along[kept] = True
            along = along.view([-1 if a == int(axis) else 1 for a in range(len(shape))]).expand(shape)
            masks[name] = masks[name] & along if name in masks else along.clone()
        return masks

    def counts(self) -> dict[str, dict[str, int]]:
        """By prunable parameter: ``total`` and ``kept`` weights."""
        masks = self.masks()
        found = {}
        for name in self.provenance["prunable"]:
            total = int(torch.Size(self.shapes[name]).numel())
            found[name] = {"total": total, "kept": int(masks[name].sum()) if name in masks else total}
        return found

    def sparsity(self) -> dict[str, float]:
        """Share removed: ``prunable`` of the prunable parameters, ``all`` of all parameters (buffers not counted)."""
        counts = self.counts().values()
        masks, buffers = self.masks(), set(self.provenance.get("buffers", ()))
        total = sum(int(torch.Size(s).numel()) for n, s in self.shapes.items() if n not in buffers)
        removed = sum(int((~mask).sum()) for name, mask in masks.items() if name not in buffers)
        prunable = sum(c["total"] for c in counts)
        return {"prunable": 1 - sum(c["kept"] for c in counts) / prunable, "all": removed / total}

    def edited(self, keep: Mapping[str, Tensor]) -> Plan:
        """The same plan with other decisions, marked as edited."""
        changed = replace(self, keep={**self.keep, **keep}, provenance={**self.provenance, "edited": True})
        changed.check("edited plan")
        return changed

    def check(self, source: object) -> None:
        """Refuses decisions that cannot be carried out.

        Raises:
            ArtifactError: unfit shapes or names, or a group without a channel left.
        """
        for name, keep in self.keep.items():
            if self.structure == "unstructured":
                expected = self.shapes.get(name)
            else:
                sizes = {tuple(v.shape[:1]) for k, v in self.index.items() if k.split("|")[0] == name}
                expected = sizes.pop() if len(sizes) == 1 else None
            if expected is None:
                raise ArtifactError(f"{source}: {name} is not part of the model it was made for")
            if tuple(keep.shape) != tuple(expected):
                raise ArtifactError(f"{source}: {name} has shape {tuple(keep.shape)}, expected {tuple(expected)}")
            if self.structure != "unstructured" and not keep.any():
                raise ArtifactError(f"{source}: {name} would lose all of its {len(keep)} channels; keep one at least")

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: ``keep/<name>`` (uint8, 1 stays, 0 goes) is what a person may edit."""
        header = {
            "kind": "plan",
            "schema": SCHEMA,
            "structure": self.structure,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "provenance": self.provenance,
            "digest": self.digest,
        }
        tensors = {KEEP + name: keep.to(torch.uint8) for name, keep in self.keep.items()}
        checkpoint.write_tensors(Path(path), {**tensors, **{INDEX + k: v for k, v in self.index.items()}}, header)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan; one whose decisions were changed by hand since it was saved comes back marked as edited.

        Raises:
            ArtifactError: not a plan, truncated, or decisions that cannot be carried out.
        """
        path = Path(path)
        header = checkpoint.read_header(path, "plan")
        tensors = checkpoint.read_tensors(path)
        with checkpoint.reading(path, "plan"):
            return cls._from(path, header, tensors)

    @classmethod
    def _from(cls, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        if header["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: schema {header['schema']}, this prunekit reads {SCHEMA}")
        keep = {}
        for key, tensor in tensors.items():
            if key.startswith(KEEP):
                if not ((tensor == 0) | (tensor == 1)).all():
                    raise ArtifactError(f"{path}: {key} must hold 0 and 1 only")
                keep[key.removeprefix(KEEP)] = tensor.bool()
        plan = cls(
            header["structure"],
            keep,
            {k.removeprefix(INDEX): v for k, v in tensors.items() if k.startswith(INDEX)},
            {name: tuple(shape) for name, shape in header["shapes"].items()},
            header["provenance"],
        )
        plan.check(path)
        for key in ("criterion", "allocation", "sparsity", "model", "trajectory"):
            plan.provenance[key]
        plan.sparsity()  # every name and axis that the plan speaks of exists
        return plan if plan.digest == header["digest"] else plan.edited({})
