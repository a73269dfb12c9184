"""Whole residual blocks: those that do nothing once their weights are 0 but normalise, found by running them so."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.structure.cut import Prober, put
from prunekit.structure.groups import SKIP, Group, Groups, tied_names
from prunekit.structure.replacements import argument, arguments, first_tensor
from prunekit.structure.structure import Mappings, Structure, checked

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMED = 1e-3
"""How far what was normalised twice may be from what was normalised once: each adds its epsilon to the variance."""
Calls = list[tuple[Any, Any]]
"""Arguments and keyword arguments of every call of a module."""


def layer_units(prober: Prober, attention: Mappings) -> Groups:
    """Whole residual blocks; all were cut once."""
    return Groups(*checked(prober, *layer_groups(prober)))


STRUCTURE = Structure(
    layer_units,
    "whole residual blocks",
    nothing="no stack of blocks (nn.Sequential or nn.ModuleList) was found",
)


@torch.no_grad()
def layer_groups(prober: Prober) -> tuple[list[Group], dict[str, str]]:
    """A group of one unit for every block that can go, and the refused, with reasons.

    Blocks are members of an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` at any depth that hold parameters. One can
    go when, with all its tensors at 0, it gives back its first input exactly (on the inputs that the examples bring it), alone
    or first in a tuple, behind it nothing or what it was given. A block that normalises the sum with its input (as BERT's do)
    gives its input normalised then; without the block its input goes on as it is, in the masked model too (``Group.masked``).
    Where a stack's members can go, it is not looked at as one; where none of a stack's can, what is inside them is.
    """
    search = _Search(prober)
    search.inside("", prober.model)
    return search.found, search.refused


class _Search:
    def __init__(self, prober: Prober) -> None:
        self.prober, self.tied = prober, tied_names(prober.model)
        self.found: list[Group] = []
        self.refused: dict[str, str] = {}
        self._calls = _calls(prober)

    def inside(self, path: str, module: nn.Module) -> bool:
        """Looks at everything in ``module``; whether something of it can go."""
        some = False
        left: list[tuple[str, nn.Module, str]] = []
        for short, child in module.named_children():
            name = f"{path}.{short}" if path else short
            if next(child.parameters(), None) is None:
                continue
            if not isinstance(module, CONTAINERS) or isinstance(child, nn.ModuleList | nn.ModuleDict):
                some |= self.inside(name, child)
            elif (reason := self._member(name, child)) is None:
                some = True
            else:
                left.append((name, child, reason))
        whole = some
        for name, child, reason in left:  # where others of their stack can go as a whole, what is inside these stays
            known = dict(self.refused)
            if not whole and not isinstance(child, nn.Sequential) and self.inside(name, child):
                some = True
            else:
                self.refused = known | {name: reason}
        return some

    def _member(self, name: str, block: nn.Module) -> str | None:
        """Notes what can go of a member of a stack, itself or (of a stack in it) its members; else says why it cannot."""
        if isinstance(block, nn.Sequential):
            known = dict(self.refused)
            if self.inside(name, block):
                return None
            self.refused = known  # what is said of the stack says it of its members
        kind, masked, reason = self._kind(name, block)
        if kind is None:
            return reason
        members = {
            f"{name}.{key}@0": torch.arange(tensor.shape[0])[None]
            for key, tensor in _tensors(block)
            if tensor.dim() and (tensor.is_floating_point() or isinstance(tensor, nn.Parameter))
        }
        self.found.append(Group(name, members, {}, {name: kind}, {name: kind} if masked else {}))
        return None

    def _kind(self, name: str, block: nn.Module) -> tuple[str | None, bool, str]:
        """What may take the block's place; whether it must in the masked model too; or None, and why nothing may."""
        for key, _ in block.named_parameters():
            other = self.tied.get(f"{name}.{key}")
            if other is not None and not other.startswith(f"{name}."):
                return None, False, f"{name}.{key} is tied to {other}; surgery would untie them"
        calls = self._calls.get(name, [])
        if not calls:
            return None, False, "is not called as a module on the example inputs"
        norms = [module for module in block.modules() if _is_norm(module)]
        kind, reason = self._gives_back(block, calls, {})
        if kind is None and norms:  # a block that normalises what it has added to its input
            plain = {norm: _unscaled(norm) for norm in norms}
            normed, _ = self._gives_back(block, calls, plain)
            return normed, normed is not None, reason
        return kind, False, reason

    def _gives_back(self, block: nn.Module, calls: Calls, norms: Mapping[nn.Module, dict[str, Tensor]]) -> tuple[str | None, str]:
        """What a block that is without weights gives in every call, its input as it is or (with ``norms``) normalised.

        Args:
            norms: normalisations of the block -> what their tensors become in the place of 0.
        """
        kinds = set()
        with self.prober.restoring():
            for key, tensor in list(_tensors(block)):
                owner, _, short = key.rpartition(".")
                if tensor.is_floating_point():
                    value = norms.get(block.get_submodule(owner), {}).get(short)
                    put(block, key, torch.zeros_like(tensor) if value is None else value)
            for args, kwargs in calls:
                given = first_tensor(args, kwargs)
                if given is None:
                    return None, "it is given no tensor"
                given = given.clone()
                try:
                    out = block(*args, **kwargs)
                    normed = [norm(given) for norm in norms]
                except Exception:  # the user's own module
                    return None, "it does not run with its weights at 0"
                kind, reason = _kind_of(out, given, [_passed(part, block, args, kwargs) for part in _behind(out)])
                if kind is not None and not _agrees(out, given, normed):
                    kind, reason = None, "with its weights at 0 it does not give back its input, so it is no residual block"
                if kind is None:
                    return None, reason
                kinds.add(kind)
        return (kinds.pop(), "") if len(kinds) == 1 else (None, "it gives another kind of answer from call to call")


def _behind(out: Any) -> tuple[Any, ...]:
    return tuple(out[1:]) if isinstance(out, tuple) else ()


def _passed(part: Any, block: nn.Module, args: Any, kwargs: Any) -> str | None:
    """What a part of an answer is: ``-`` for None, the number of an argument that is passed on, None for anything else."""
    if part is None:
        return "-"
    names = arguments(block)
    return next((str(n) for n, name in enumerate(names) if argument(args, kwargs, n, name) is part), None)


def _kind_of(out: Any, given: Tensor, behind: list[str | None]) -> tuple[str | None, str]:
    """The kind of replacement that gives an answer of this form; or None, and why there is none."""
    first = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(first, Tensor):
        return None, f"it returns a {type(out).__name__}, not a tensor or a tuple that begins with one"
    if len(behind) > 4 or None in behind:
        return None, "it returns more than what becomes of its input"
    if first.shape != given.shape:
        return None, f"it turns {tuple(given.shape)} into {tuple(first.shape)}, so it is no residual block"
    if not isinstance(out, tuple):
        return SKIP, ""
    others = "".join(f"@{number}" for number in behind) if set(behind) - {"-"} else ""
    return f"{SKIP}-{1 + len(behind)}{others}", ""


def _agrees(out: Any, given: Tensor, normed: Sequence[Tensor]) -> bool:
    """Whether the answer is the input, or what one of the normalisations makes of it."""
    first = out[0] if isinstance(out, tuple) else out
    if not normed:
        return torch.equal(first, given)
    return any(each.shape == first.shape and torch.allclose(first, each, rtol=NORMED, atol=NORMED) for each in normed)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)


def _unscaled(norm: nn.Module) -> dict[str, Tensor]:
    """Its tensors as they do nothing beside normalising."""
    return {name: torch.full_like(tensor, float(name == "weight")) for name, tensor in norm.named_parameters(recurse=False)}


def _calls(prober: Prober) -> dict[str, Calls]:
    """Copies of what every member of a container is called with in one run, caches as they were before the call."""
    calls: dict[str, Calls] = {}
    hooks = []
    for path, module in prober.model.named_modules():
        for short, child in module.named_children() if isinstance(module, CONTAINERS) else ():
            name = f"{path}.{short}" if path else short

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls.setdefault(name, []).append(copy.deepcopy((args, kwargs)))

            hooks.append(child.register_forward_pre_hook(note, with_kwargs=True))
    try:
        prober.outputs()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()
