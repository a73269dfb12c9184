"""What stays and what goes: a plan, which can be looked at and edited before it is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.artifact import conform
from prunekit.errors import ArtifactError, UsageError
from prunekit.plan.patterns import pattern_fault
from prunekit.structure import pattern_of
from prunekit.structure.cut import Cut, values_without
from prunekit.structure.groups import ROUTER, is_skip, kept_indices, slice_masks
from prunekit.structure.replacements import known
from prunekit.structure.stand_ins import COUNTS, known_stand_in
from prunekit.structure.units.heads import HEADS, KV_HEADS, WIDTHS
from prunekit.structure.units.neurons import NEURONS

SCHEMA = 1
KEEP, INDEX, GIVEN = "keep/", "index/", "given/"
ATTRIBUTES, REPLACE, MASKED = "attributes", "replace", "masked"
ROUND_TO, MIN_UNITS, UNIFORM = "round_to", "min_units", "uniform"
OUTPUTS = "outputs"
"""In a plan's provenance: axis of the outputs of weights where that is not the first one (patterns run along inputs)."""
SIZE_ATTRIBUTES = (
    "in_channels", "out_channels", "in_features", "out_features", "num_features", "groups", "num_channels", "num_groups",
    "num_parameters", "embedding_dim", "hidden_size", "input_size", *HEADS, *KV_HEADS, *WIDTHS, *NEURONS, *COUNTS,
)  # fmt: skip
"""Whole numbers on modules that say how large they are; a layer cut smaller needs them to match. No other may be set."""


class MissedTarget(UserWarning):
    """A plan removes far less, or far more, than was asked for."""


@dataclass(frozen=True)
class Plan:
    """A decision for every prunable weight.

    Some structures decide on weights (``unstructured``, ``2:4``, ``block:4x1``: masks on a dense model), others on units
    of groups (``channels``, ``heads``, ``layers``: taken out of the tensors), of several kinds perhaps (``heads+neurons``). A
    model pruned twice has a plan of both, its structures joined by ``+`` too.

    Attributes:
        structure: a name from ``prunekit.structure``.
        keep: True where something stays: of weights by parameter name, its shape; of units by group name, ``(units,)``.
        index: ``<group>|<param>@<axis>`` -> ``(units, block)``: what leaves with each unit.
        shapes: of every parameter and buffer of the dense model.
        provenance: scores, model, criterion, allocation, sparsity asked for, prunable parameters, what was refused,
            whether edited.
        modules: group -> ``attributes``, ``<module>:<attribute>`` -> by how much a unit lowers it; and ``replace``,
            module -> kind of what takes its place; and ``masked``, module -> kind of what stands in for it in the masked model.
            See ``prunekit.structure.Group``.
        given: ``keep`` before ``refine`` changed it; empty for a plan that was not refined.
    """

    structure: str
    keep: dict[str, Tensor]
    index: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Identifies decision and provenance, and what was refined."""
        facts = {"structure": self.structure, **self.provenance}
        if self.modules:
            facts["modules"] = self.modules
        return checkpoint.digest({**self.keep, **self.index, **{GIVEN + name: keep for name, keep in self.given.items()}}, facts)

    def saying(self, **facts: Any) -> Plan:
        """The same decision with further facts in its provenance; another plan, whose digest is another."""
        return replace(self, provenance={**self.provenance, **facts})

    @cached_property
    def groups(self) -> frozenset[str]:
        """Names of the groups whose units it decides on; other names in ``keep`` are parameters."""
        return frozenset(key.split("|")[0] for key in self.index)

    @property
    def smaller(self) -> bool:
        """Whether its pruned model has other tensors than the dense one, not just zeros in them."""
        return bool(self.groups)

    @property
    def masking(self) -> bool:
        """Whether single weights inside kept tensors go."""
        return any(name not in self.groups for name in self.keep)

    def outputs(self, name: str) -> int:
        """The axis of a weight's outputs, along which its patterns do not run."""
        return int(self.provenance.get(OUTPUTS, {}).get(name, 0))

    @property
    def twice(self) -> bool:
        """Whether it is two plans in one, see ``then``."""
        return "first" in self.provenance

    @property
    def history(self) -> list[dict[str, Any]]:
        """What ``refine`` did, round by round; empty for a plan that was not refined."""
        return list(self.provenance.get("refine", {}).get("history", []))

    @property
    def before(self) -> Plan | None:
        """The decisions that ``refine`` was given; None for a plan that was not refined, or by a prunekit that kept no record."""
        if not self.given:
            return None
        return replace(self, keep=self.given, given={}, provenance={k: v for k, v in self.provenance.items() if k != "refine"})

    def cut(self, model: nn.Module) -> Cut:
        """What leaves ``model``, the dense one, whose sizes it is counted from.

        Raises:
            AttributeError: the model has none of the modules or sizes that the plan names.
        """
        return Cut(self.kept_indices(), values_without(model, self.lowered()), self.replaced())

    def kept_indices(self) -> dict[str, Tensor]:
        """``<param>@<axis>`` -> kept indices on that axis, ascending; only axes that lose something, but not all."""
        skipped = self.skipped()
        return {m: kept for m, kept in self._kept().items() if not any(m.startswith(f"{name}.") for name in skipped)}

    def _kept(self) -> dict[str, Tensor]:
        return kept_indices(self.index, self.keep, self.shapes)

    def replaced(self) -> dict[str, str]:
        """Module -> kind of what takes its place; modules inside a skipped one are not named."""
        found = {}
        for group, facts in self.modules.items():
            if not self.keep[group].all():
                found.update(facts.get(REPLACE, {}))
        whole = [name for name, kind in found.items() if is_skip(kind)]
        return {name: kind for name, kind in found.items() if not any(name.startswith(f"{w}.") for w in whole)}

    def block(self, group: str) -> str | None:
        """The module that leaves whole with the group's only unit; None for groups of other units."""
        replaced = self.modules.get(group, {}).get(REPLACE, {})
        return next((name for name, kind in replaced.items() if is_skip(kind)), None)

    def inside(self) -> set[str]:
        """Groups of which nothing is left, whatever is decided on their units: they lie in blocks that are gone as a whole."""
        if not (skipped := tuple(f"{name}." for name in self.skipped())):
            return set()
        outside = {group for group, _, member in (key.partition("|") for key in self.index) if not member.startswith(skipped)}
        return {name for name in self.groups - outside if self.block(name) is None}

    def units_left(self) -> dict[str, int]:
        """By group, how many units are left."""
        gone = self.inside()
        return {name: 0 if name in gone else int(keep.sum()) for name, keep in self.keep.items() if name in self.groups}

    def skipped(self) -> list[str]:
        """Blocks that are gone as a whole."""
        return [name for name, kind in self.replaced().items() if is_skip(kind)]

    def stand_ins(self) -> dict[str, tuple[str, Tensor]]:
        """Module -> kind of what stands in for it in the masked model, and which units of its group stay.

        Where it is not empty, the model with zeros in it alone does not compute what the smaller one does.
        """
        return {
            name: (kind, self.keep[group])
            for group, facts in self.modules.items()
            if not self.keep[group].all()
            for name, kind in facts.get(MASKED, {}).items()
        }

    @property
    def routers(self) -> frozenset[str]:
        """Modules that choose among its units, and among those that stay once some are gone."""
        masked = (facts.get(MASKED, {}) for facts in self.modules.values())
        return frozenset(name for kinds in masked for name, kind in kinds.items() if kind == ROUTER)

    def only_zeros(self, what: str, choosing: bool = False) -> None:
        """Raises UsageError for ``what`` looks at zeros in the dense model, unless these are all that the plan does.

        Args:
            choosing: ``what`` knows of routers that choose among what stays.
        """
        if found := next((name for name in self.stand_ins() if not choosing or name not in self.routers), None):
            raise UsageError(
                f"{what}: it looks at weights that become 0, and {found} is left out or chooses otherwise, which no zeros say"
            )

    def lowered(self) -> dict[str, int]:
        """``<module>:<attribute>`` -> by how much it becomes lower (numbers of heads, of convolution groups)."""
        found: dict[str, int] = {}
        skipped = self.skipped()
        for group, facts in self.modules.items():
            removed = int((~self.keep[group]).sum())
            for key, each in facts.get(ATTRIBUTES, {}).items():
                if removed and not any(key.startswith((f"{name}.", f"{name}:")) for name in skipped):
                    found[key] = found.get(key, 0) + removed * each
        return found

    def masks(self) -> dict[str, Tensor]:
        """Dense boolean masks, True where a weight stays, of every parameter or buffer that the plan touches."""
        masks = slice_masks(self._kept(), self.shapes)
        for name, keep in self.keep.items():
            if name not in self.groups:
                masks[name] = masks[name] & keep if name in masks else keep
        return masks

    def weight_masks(self) -> dict[str, Tensor]:
        """Masks of single weights in the pruned model's own coordinates; empty where only whole units go."""
        kept, found = self.kept_indices(), {}
        skipped = self.skipped()
        for name, mask in self.keep.items():
            if name in self.groups or any(name.startswith(f"{block}.") for block in skipped):
                continue
            for axis in range(mask.dim()):
                if f"{name}@{axis}" in kept:
                    mask = mask.index_select(axis, kept[f"{name}@{axis}"])
            found[name] = mask
        return found

    def then(self, second: Plan) -> Plan:
        """One plan of the dense model for both: this one first, then ``second``, made for the model that this one gave.

        Raises:
            UsageError: ``second`` was made for a model of other shapes.
        """
        kept, shapes = self.kept_indices(), dict(self.shapes)
        skipped = self.skipped()
        for name, shape in shapes.items():
            now = tuple(len(kept.get(f"{name}@{axis}", range(size))) for axis, size in enumerate(shape))
            gone = any(name.startswith(f"{block}.") for block in skipped)
            if second.shapes.get(name) != (None if gone else now):
                raise UsageError(f"the second plan is of another model: {name} is {second.shapes.get(name)}, not {now}")
        keep, index, modules = dict(self.keep), dict(self.index), dict(self.modules)
        for name, decision in second.keep.items():
            if name in second.groups:
                members = {k.split("|")[1]: v for k, v in second.index.items() if k.split("|")[0] == name}
                dense = {m: kept[m][where] if m in kept else where for m, where in members.items()}
                if self._same_units(name, dense, len(decision)):
                    keep[name] = self.keep[name].clone()
                    keep[name][self.keep[name]] = decision
                else:
                    new = _unused(name, keep.keys() | (second.keep.keys() - {name}))
                    keep[new] = decision
                    index |= {f"{new}|{member}": where for member, where in dense.items()}
                    if name in second.modules:
                        modules[new] = second.modules[name]
            else:
                places = [kept.get(f"{name}@{axis}", torch.arange(size)) for axis, size in enumerate(shapes[name])]
                both = keep[name].clone() if name in keep else torch.ones(shapes[name], dtype=torch.bool)
                grid = torch.meshgrid(*places, indexing="ij")
                both[grid] = both[grid] & decision
                keep[name] = both
        mine = self.structure.split("+")
        structure = "+".join([*mine, *(s for s in second.structure.split("+") if s not in mine)])
        same = ("model", "trajectory", "prunable", "buffers")
        facts = {k: self.provenance[k] for k in same if k in self.provenance}
        return Plan(
            structure, keep, index, shapes, {**second.provenance, **facts, "first": self.digest, "then": second.digest}, modules
        )

    def _same_units(self, name: str, dense: Mapping[str, Tensor], size: int) -> bool:
        """Whether a later plan's group, in dense coordinates, is what is left of this plan's group of that name."""
        if name not in self.groups or int(self.keep[name].sum()) != size:
            return False
        mine = {k.split("|")[1]: v[self.keep[name]] for k, v in self.index.items() if k.split("|")[0] == name}
        return mine.keys() == dense.keys() and all(torch.equal(mine[m], dense[m]) for m in mine)

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

    @property
    def missed(self) -> str | None:
        """What to tell somebody who asked for another sparsity than the plan comes near; None where it does.

        Far is more than 5 points, and more than a fifth of what was asked for. Plans that were edited or joined ask for nothing.
        """
        asked = self.provenance.get("sparsity")
        if asked is None or self.provenance.get("edited") or self.twice:
            return None
        reached = self.sparsity()["prunable"]
        if abs(reached - asked) <= max(0.05, 0.2 * asked):
            return None
        left = self.provenance.get("refused", {})
        named = (
            f"; left whole: {', '.join(list(left)[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''}" if left else ""
        )
        why = "no choice of the units that can go comes nearer"
        return f"asked for {100 * asked:.1f} % of the prunable weights, the plan removes {100 * reached:.1f} %: {why}{named}"

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
        pattern = pattern_of(self.structure)
        conform(self.provenance.get("request", {}), dict[str, Any], "request")
        for name, keep in self.keep.items():
            unit = name in self.groups
            if unit:
                sizes = {tuple(v.shape[:1]) for k, v in self.index.items() if k.split("|")[0] == name}
                expected = sizes.pop() if len(sizes) == 1 else None
            else:
                expected = self.shapes.get(name)
            if expected is None:
                raise ArtifactError(f"{source}: {name} is not part of the model it was made for")
            if tuple(keep.shape) != tuple(expected):
                raise ArtifactError(f"{source}: {name} has shape {tuple(keep.shape)}, expected {tuple(expected)}")
            if unit and not keep.any() and not any(map(is_skip, self.modules.get(name, {}).get(REPLACE, {}).values())):
                raise ArtifactError(f"{source}: {name} would lose all of its {len(keep)} {self._units()}; keep one at least")
            rows = keep if unit else keep.movedim(self.outputs(name), 0)
            if not unit and pattern is not None and (fault := pattern_fault(rows, pattern)) is not None:
                raise ArtifactError(f"{source}: {name} {fault}; its structure is {self.structure}")
        for key, where in self.index.items():
            name, _, axis = key.split("|")[1].rpartition("@")
            if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < self.shapes[name][int(axis)]:
                raise ArtifactError(f"{source}: {INDEX}{key} names units that {name} does not have")
        lost = sorted(self.groups - self.keep.keys())
        if lost:
            raise ArtifactError(f"{source}: says nothing of {lost[0]}")
        if self.given and {n: k.shape for n, k in self.given.items()} != {n: k.shape for n, k in self.keep.items()}:
            raise ArtifactError(f"{source}: what was refined ({GIVEN}) is not of what it keeps ({KEEP})")
        for name, facts in self.modules.items():
            if name not in self.groups or not set(facts) <= {ATTRIBUTES, REPLACE, MASKED}:
                raise ArtifactError(f"{source}: modules of {name} are not what a plan holds")
            for key, each in facts.get(ATTRIBUTES, {}).items():
                if key.rpartition(":")[2] not in SIZE_ATTRIBUTES or not isinstance(each, int) or each < 1:
                    raise ArtifactError(f"{source}: {key} cannot be lowered by {each!r}")
            for key, kind in facts.get(REPLACE, {}).items():
                if not known(kind):
                    raise ArtifactError(f"{source}: {key} cannot be replaced by {kind!r}")
            for key, kind in facts.get(MASKED, {}).items():
                if not known_stand_in(kind):
                    raise ArtifactError(f"{source}: nothing of kind {kind!r} stands in for {key}")

    def _units(self) -> str:
        return self.structure if "+" not in self.structure else "units"

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: ``keep/<name>`` (uint8, 1 stays, 0 goes) is what a person may edit.

        ``given/<name>``: the same before it was refined.
        """
        header = {
            "kind": "plan",
            "schema": SCHEMA,
            "structure": self.structure,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "provenance": self.provenance,
            "digest": self.digest,
        }
        if self.modules:
            header["modules"] = self.modules
        decisions = ((KEEP, self.keep), (GIVEN, self.given))
        tensors = {kind + name: keep.to(torch.uint8) for kind, kept in decisions for name, keep in kept.items()}
        checkpoint.write_tensors(Path(path), {**tensors, **{INDEX + k: v for k, v in self.index.items()}}, header)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan; one whose decisions were changed by hand since it was saved comes back marked as edited.

        Raises:
            ArtifactError: not a plan, truncated, or decisions that cannot be carried out.
        """
        path = Path(path)
        header = checkpoint.read_header(path, "plan")
        tensors = checkpoint.read_tensors(path, changed=True)  # its own digest tells
        with checkpoint.reading(path, "plan"):
            return cls._from(path, header, tensors)

    @classmethod
    def _from(cls, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        if header["schema"] != SCHEMA:
            raise ArtifactError(f"{path}: schema {header['schema']}, this prunekit reads {SCHEMA}")
        decisions: dict[str, dict[str, Tensor]] = {KEEP: {}, GIVEN: {}}
        for key, tensor in tensors.items():
            for kind, kept in decisions.items():
                if key.startswith(kind):
                    if not ((tensor == 0) | (tensor == 1)).all():
                        raise ArtifactError(f"{path}: {key} must hold 0 and 1 only")
                    kept[key.removeprefix(kind)] = tensor.bool()
        plan = cls(
            header["structure"],
            decisions[KEEP],
            {k.removeprefix(INDEX): v for k, v in tensors.items() if k.startswith(INDEX)},
            {name: torch.Size(shape) for name, shape in header["shapes"].items()},
            header["provenance"],
            header.get("modules", {}),
            decisions[GIVEN],
        )
        plan.check(path)
        for key in ("criterion", "allocation", "sparsity", "model", "trajectory"):
            plan.provenance[key]
        plan.sparsity()  # every name and axis that the plan speaks of exists
        return plan if plan.digest == header["digest"] else plan.edited({})


def _unused(name: str, taken: set[str]) -> str:
    """``name``, or ``name/2``, ``name/3`` … when it is taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}/{number}"
    return found
