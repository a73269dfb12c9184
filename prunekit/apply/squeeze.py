"""Channels and heads that a mask left without inputs or without readers, taken out for real.

A channel nobody reads can go as it is. A channel that reads nothing sends a constant, which its readers add to their
bias. Removing some leaves others without inputs or readers, so it goes on until nothing changes. What the model computes
stays the same, and is checked; where that would not be exact, the channel stays and is named.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunekit.apply.masks import apply_masks
from prunekit.apply.surgery import cut_units
from prunekit.batch import Batch, Inputs, answers, call, to
from prunekit.errors import StructureError, UsageError
from prunekit.plan import Plan
from prunekit.plan.plan import ATTRIBUTES, REPLACE
from prunekit.structure import Group, find_groups
from prunekit.structure.cut import CONVOLUTIONS
from prunekit.structure.groups import shapes_of
from prunekit.structure.roles import weight_roles
from prunekit.structure.structure import Mappings
from prunekit.trajectory.copies import copied

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Allowed difference of outputs, relative to the largest; other types take float32's."""


@dataclass(frozen=True)
class Squeezed:
    """A smaller model that computes what the masked one does.

    Attributes:
        model: a copy, cut smaller; training mode and grad flags are kept.
        plan: of the dense model, which units were taken out: structure ``channels``.
        masks: of the smaller tensors, by parameter name.
        removed: units taken out, by layer.
        left: channels that lost their inputs or readers and stay all the same, by layer, and why.
    """

    model: nn.Module
    plan: Plan
    masks: dict[str, Tensor]
    removed: dict[str, int]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, Tensor]:
        """``<param>@<axis>`` -> kept indices of the dense model's axis, only where something went."""
        return self.plan.kept_indices()


def squeeze(
    model: nn.Module,
    plan: Plan | Mapping[str, Tensor],
    example_inputs: Inputs,
    samples: Iterable[Batch] | None = None,
    attention: Mappings = (),
) -> Squeezed:
    """Masks ``model`` and removes the channels and heads that the masks left without effect.

    Args:
        model: dense or masked already; left as it is.
        plan: a plan of masks (unstructured, N:M, blocks), or masks by parameter name (True stays).
        example_inputs: one or two samples, for tracing the model.
        samples: more inputs (labels are not looked at), to see which channels are constant and to check the result;
            ``example_inputs`` are always among them.
        attention: as in ``make_plan``.

    Raises:
        UsageError: the plan takes units out itself.
        StructureError: nothing of the model can be cut (says why, by layer), or the squeezed model does not compute the same.

    Example:
        >>> import torch
        >>> from prunekit import squeeze
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> masks = {"0.weight": torch.ones(8, 4, dtype=torch.bool), "2.weight": torch.ones(2, 8, dtype=torch.bool)}
        >>> masks["2.weight"][:, 3:] = False  # nothing reads the last five neurons any more
        >>> small = squeeze(model, masks, torch.randn(2, 4))
        >>> small.model[0].out_features, small.removed
        (3, {'0': 5})
    """
    if isinstance(plan, Plan) and plan.smaller:
        raise UsageError(f"squeeze is for plans of masks; {plan.structure} are cut out as they are")
    masks = plan.masks() if isinstance(plan, Plan) else dict(plan)
    masked = copied(model).cpu().eval()
    apply_masks(masked, masks)
    inputs = [to(example_inputs, "cpu"), *(to(x, "cpu") for x, _ in samples or ())]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    groups = find_groups("channels", masked, inputs[0], attention)
    work = _Work(copied(masked), groups, inputs)
    while work.round():
        pass
    small, taken = work.cut()
    kept = taken.kept_indices()
    _check_same(small, masked, inputs)
    smaller = {}
    for name, mask in masks.items():
        for axis in range(mask.dim()):
            if f"{name}@{axis}" in kept:
                mask = mask.index_select(axis, kept[f"{name}@{axis}"])
        smaller[name] = mask
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in frozen)
    device = next(model.parameters()).device
    return Squeezed(small.train(model.training).to(device), taken, smaller, work.removed(), work.left)


class _Work:
    """A full-size model in which removed channels are zeroed on both sides, until it is cut."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], inputs: Sequence[Inputs]) -> None:
        self.model, self.groups, self.inputs = model, groups, inputs
        self.gone = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        self.left: dict[str, str] = {}

    def round(self) -> bool:
        """Takes out what can go by now; False when that is nothing."""
        changed = False
        self.left = {}
        for group in self.groups:
            changed |= self._unread(group)
        for group in self.groups:
            changed |= self._constant(group)
        return changed

    def _unread(self, group: Group) -> bool:
        """Channels whose every reader has only zeros for them."""
        readers = _readers(group, self.model)
        read = torch.full((group.size,), not readers)  # by what, is not known where there is no reader
        for name, axis, index in readers:
            used = (self.model.get_parameter(name) != 0).movedim(axis, 0).flatten(1).any(1)
            read |= used[index].any(1)
        return self._remove(group, self._all_but_one(group, ~read))

    def _constant(self, group: Group) -> bool:
        """Channels whose every producer has only zeros: what they send is folded into their readers' biases."""
        producers = _producers(group, self.model)
        fed = torch.full((group.size,), not producers)
        for name, axis, index in producers:
            fed |= (self.model.get_parameter(name) != 0).movedim(axis, 0).flatten(1).any(1)[index].any(1)
        candidates = ~fed & ~self.gone[group.name]
        if not candidates.any():
            return False
        folds: list[tuple[nn.Module, Tensor]] = []
        for name, _, index in _readers(group, self.model):
            reader = self.model.get_submodule(name.rpartition(".")[0])
            if not (isinstance(reader, nn.Linear) or (isinstance(reader, CONVOLUTIONS) and reader.groups == 1)):
                self._leave(group, candidates, f"{name.rpartition('.')[0]} adds its inputs up in a way that is not handled")
                return False
            value, varies = self._sent(reader)
            obstacle = _obstacle(reader)
            moving, nonzero = varies[index].any(1), (value[index] != 0).any(1)
            why = torch.zeros(group.size, dtype=torch.bool)
            if obstacle is not None:
                why = candidates & nonzero & ~moving
                self._leave(group, why, f"{name.rpartition('.')[0]} {obstacle}")
            self._leave(group, candidates & moving, f"what reaches {name.rpartition('.')[0]} from it is not constant")
            candidates = candidates & ~moving & ~why
            folds.append((reader, value))
        candidates = self._all_but_one(group, candidates)
        for (reader, value), (_, _, index) in zip(folds, _readers(group, self.model), strict=True):
            sent = torch.zeros_like(value)
            chosen = index[candidates].flatten()
            sent[chosen] = value[chosen]
            if sent.any():
                _fold(reader, sent)
        return self._remove(group, candidates)

    @torch.no_grad()
    def _sent(self, reader: nn.Module) -> tuple[Tensor, Tensor]:
        """By input channel of ``reader``: the value that it gets, and whether that varies over samples or positions."""
        lowest: Tensor | None = None
        highest: Tensor | None = None
        axis = -1 if isinstance(reader, nn.Linear) else 1

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal lowest, highest
            flat = arguments[0].movedim(axis, 0).flatten(1)
            low, high = flat.amin(1), flat.amax(1)
            lowest = low if lowest is None else torch.minimum(lowest, low)
            highest = high if highest is None else torch.maximum(highest, high)

        hook = reader.register_forward_pre_hook(note)
        try:
            for x in self.inputs:
                call(self.model, copy.deepcopy(x))
        finally:
            hook.remove()
        if lowest is None or highest is None:  # traced, but not called now: nothing is known of it
            weight: Tensor = reader.weight  # type: ignore[assignment]
            return weight.new_zeros(weight.shape[1]), torch.ones(weight.shape[1], dtype=torch.bool)
        rounding = 8 * torch.finfo(lowest.dtype).eps * torch.maximum(lowest.abs(), highest.abs())
        return lowest, highest - lowest > rounding

    def _leave(self, group: Group, channels: Tensor, why: str) -> None:
        if channels.any():
            self.left[group.name] = f"{int(channels.sum())} without inputs stay: {why}"

    def _all_but_one(self, group: Group, channels: Tensor) -> Tensor:
        """The channels without one of them, if a layer would be left empty."""
        channels = channels & ~self.gone[group.name]
        if bool((channels | self.gone[group.name]).all()):
            channels[channels.nonzero()[0]] = False
            self.left[group.name] = "1 without effect stays: a layer cannot be empty"
        return channels

    @torch.no_grad()
    def _remove(self, group: Group, channels: Tensor) -> bool:
        """Zeroes everything that belongs to the channels."""
        for member, index in group.members.items():
            name, axis = member.rsplit("@", 1)
            _tensor(self.model, name).movedim(int(axis), 0)[index[channels].flatten()] = 0
        self.gone[group.name] |= channels
        return bool(channels.any())

    def removed(self) -> dict[str, int]:
        return {name: int(gone.sum()) for name, gone in self.gone.items() if gone.any()}

    def cut(self) -> tuple[nn.Module, Plan]:
        """The model with the zeroed units gone, and the plan that says which these are."""
        index = {key: where for group in self.groups for key, where in group.index().items()}
        modules = {group.name: {ATTRIBUTES: group.attributes, REPLACE: group.replace} for group in self.groups}
        keep = {name: ~gone for name, gone in self.gone.items()}
        plan = Plan("channels", keep, index, shapes_of(self.model), {}, modules)
        return cut_units(self.model, plan, self.inputs[0]), plan


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, short = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), short)
    return found


Side = tuple[str, int, Tensor]
"""Weight, its axis, and which of that axis are whose, ``(units, block)``."""


def _readers(group: Group, model: nn.Module) -> list[Side]:
    """Weights that take the group's units as inputs; a grouped convolution passes them on and is none."""
    return [side for side, reads in _sides(group, model) if reads]


def _producers(group: Group, model: nn.Module) -> list[Side]:
    """Weights of two or more axes whose outputs are the group's units."""
    return [side for side, reads in _sides(group, model) if not reads]


def _sides(group: Group, model: nn.Module) -> list[tuple[Side, bool]]:
    """Weights of two or more axes, and whether that axis is one of inputs."""
    roles, found = weight_roles(model), []
    for member, index in group.members.items():
        name, axis = member.rsplit("@", 1)
        if name in roles:
            embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding | nn.EmbeddingBag)
            found.append(((name, int(axis), index), not embedding and int(axis) == roles[name].input))
    return found


def _obstacle(reader: nn.Module) -> str | None:
    """Why a constant other than 0 cannot be added to this layer's bias; None if it can."""
    if getattr(reader, "bias", None) is None:
        return "has no bias to take its constant"
    if isinstance(reader, CONVOLUTIONS) and reader.padding_mode == "zeros" and reader.padding != "valid":
        padding = reader._reversed_padding_repeated_twice if reader.padding == "same" else reader.padding
        if any(int(p) for p in padding):
            return "pads with zeros, so its constant is another one at the border"
    return None


@torch.no_grad()
def _fold(reader: nn.Module, sent: Tensor) -> None:
    """Adds what the constant inputs ``sent`` ``(inputs,)`` contribute to the bias."""
    weight: Tensor = reader.weight  # type: ignore[assignment]
    bias: Tensor = reader.bias  # type: ignore[assignment]
    bias += (weight.flatten(2).sum(2) if weight.dim() > 2 else weight).double().matmul(sent.double()).to(bias.dtype)


@torch.no_grad()
def _check_same(small: nn.Module, masked: nn.Module, inputs: Sequence[Inputs]) -> None:
    small.eval()
    for x in inputs:
        pairs = zip(answers(call(small, copy.deepcopy(x))), answers(call(masked, copy.deepcopy(x))), strict=True)
        for got, expected in pairs:
            off = float(torch.where(got == expected, 0, got - expected).abs().max()) if got.numel() else 0.0
            most = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
            if not off <= TOLERANCE.get(got.dtype, TOLERANCE[torch.float32]) * (1 + most):
                raise StructureError(
                    f"squeeze: the smaller model's outputs differ from the masked model's by {off:.3g}; something in it makes "
                    "a channel without inputs or readers matter, so it cannot be squeezed"
                )
