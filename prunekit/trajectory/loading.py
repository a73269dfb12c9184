"""How a state gets into a model: names that wrappers prefixed, tied tensors, models on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prunekit.errors import ArtifactError
from prunekit.remote import Place
from prunekit.trajectory.bare import bare
from prunekit.trajectory.derived import refresh
from prunekit.trajectory.layout import ORIGINAL, mask_of
from prunekit.trajectory.ties import overlaps, tied

SEGMENTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that wrappers put in (DDP, torch.compile, FSDP, activation checkpointing)."""


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: Place) -> None:
    """Loads ``state`` into ``model``; names of tied parameters may be missing, anything else may not.

    A model on the meta device gets memory on the CPU first. A weight under a mask of torch.nn.utils.prune
    (``<name>_orig``, ``<name>_mask``) goes into a model that has plain weights as what it computes with.

    Raises:
        ArtifactError: names the first missing, unexpected, misshapen or quantised tensor, tied tensors that differ in
            ``state``, or what would stay without numbers.
    """
    model = bare(model)
    own = _tensors(model)
    state = _without_masks(state, own)
    for name, tensor in state.items():
        if name not in own:
            raise ArtifactError(f"{source}: has {name}, which the model does not")
        if own[name].shape != tensor.shape:
            raise ArtifactError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise ArtifactError(
                f"{source}: {name} is {tensor.dtype}, the model's {own[name].dtype}; load weights that are not quantised"
            )
    groups = tied(model)
    for name in own:
        names = groups.get(name, [name])
        given = [state[other] for other in names if other in state]
        if not given:
            raise ArtifactError(f"{source}: lacks {name}, which the model has")
        if any(not torch.equal(given[0], other) for other in given[1:]):
            raise ArtifactError(
                f"{source}: {' and '.join(names)} are tied in the model and differ there; untie them in the model"
            )
    materialise(model, state, source)
    model.load_state_dict(dict(state), strict=False)
    own = _tensors(model)
    for first, second, how in overlaps(own):
        for name in (first, second):
            if name in state and not torch.equal(own[name], state[name].to(own[name])):
                raise ArtifactError(f"{source}: {first} and {second} share memory in the model ({how}) and differ there")
    refresh(model)


def fitted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` under the model's names, where a prefix or a wrapper's part of the name is all that differs; else as it is.

    Training programs keep models in wrappers, whose names are ``module.``, ``_orig_mod.``, ``model.`` and then the model's.
    """
    own = set(_tensors(bare(model)))
    plain = _without_masks(state, own)
    if own.issuperset(plain):
        return plain
    bared = _without_masks({_without_segments(name): tensor for name, tensor in state.items()}, own)
    if len(bared) < len(plain):
        bared = plain
    if own.issuperset(bared):
        return bared
    last = max(own, key=len, default="")
    for names in (plain, bared):
        for prefix in {name.removesuffix(last) for name in names if name.endswith("." + last)}:
            cut = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
            if all(name.startswith(prefix) for name in names) and own.issuperset(cut):
                return cut
        first = max(names, key=len, default="")
        for prefix in {name.removesuffix(first) for name in own if name.endswith("." + first)}:
            if own.issuperset(prefix + name for name in names):
                return {prefix + name: tensor for name, tensor in names.items()}
    return plain


@torch.no_grad()
def materialise(model: nn.Module, state: Iterable[str], source: Place) -> None:
    """Gives tensors on the meta device memory on the CPU, where ``state`` has numbers for them.

    Raises:
        ArtifactError: names one that ``state`` has none for.
    """
    known = set(state)
    groups = tied(model)
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                name = f"{path}.{key}" if path else key
                if not known.intersection(groups.get(name, [name])):
                    raise ArtifactError(f"{source}: {name} is on the meta device and has no numbers there; build it on the CPU")
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                table[key] = made[id(tensor)]
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                name = f"{path}.{key}" if path else key
                raise ArtifactError(f"{source}: {name} is on the meta device and has no numbers there; build it on the CPU")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _without_masks(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Masks of torch.nn.utils.prune multiplied in, where the model has plain weights."""
    names, found = set(own), dict(state)
    for name in state:
        plain, mask = name.removesuffix(ORIGINAL), mask_of(name)
        if name.endswith(ORIGINAL) and mask in state and plain in names and name not in names:
            found[plain] = found.pop(name) * found.pop(mask).to(state[name])
    return found


def _without_segments(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)
