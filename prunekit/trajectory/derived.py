"""Weights that a layer computes from parameters: parametrizations, weight_norm, spectral_norm, torch.nn.utils.prune."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunekit.errors import StructureError
from prunekit.trajectory.bare import bare


@dataclass(frozen=True)
class Derived:
    """One computed weight.

    Attributes:
        name: of the weight, as the layer uses it: ``0.weight``.
        parts: names of the parameters that it is computed from.
        how: what computes it, for messages.
        value: computes it from the present parameters, without side effects.
        module: the layer; the weight is its plain attribute where a hook puts it there, see ``hooked``.
        hooked: whether a forward hook sets the attribute, so that it is stale until the next forward pass.
    """

    name: str
    parts: tuple[str, ...]
    how: str
    value: Callable[[], Tensor]
    module: nn.Module
    hooked: bool

    @property
    def removal(self) -> str:
        """The call that makes it a plain parameter."""
        short = self.name.rpartition(".")[2]
        if not self.hooked:
            return f"torch.nn.utils.parametrize.remove_parametrizations(module, {short!r})"
        if self.how == "torch.nn.utils.prune":
            return f"torch.nn.utils.prune.remove(module, {short!r})"
        return f"torch.nn.utils.remove_{self.how}(module, {short!r})"


def derived_weights(model: nn.Module) -> Iterator[Derived]:
    """Every computed weight of the model, in module order."""
    for path, module in bare(model).named_modules():
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            for short, chain in module.parametrizations.items():
                parts = tuple(f"{prefix}parametrizations.{short}.{key}" for key, _ in chain.named_parameters(recurse=False))
                how = " and ".join(type(step).__name__.lstrip("_") for step in chain)
                yield Derived(prefix + short, parts, how, _evaluated(chain), module, False)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                short = hook._tensor_name
                value = _masked(hook, module)
                yield Derived(prefix + short, (f"{prefix}{short}_orig",), "torch.nn.utils.prune", value, module, True)
            elif isinstance(hook, WeightNorm):
                parts = (f"{prefix}{hook.name}_g", f"{prefix}{hook.name}_v")
                yield Derived(prefix + hook.name, parts, "weight_norm", _computed(hook, module), module, True)
            elif isinstance(hook, SpectralNorm):
                value = _computed(hook, module, False)
                yield Derived(prefix + hook.name, (f"{prefix}{hook.name}_orig",), "spectral_norm", value, module, True)


def check_derived(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuses masks that do not make the computed weights 0 where they remove, or that make them NaN.

    Raises:
        StructureError: names the parameter and what computes a weight from it.
    """
    for one in derived_weights(model):
        masked = [name for name in one.parts if name in masks and not bool(masks[name].all())]
        if not masked:
            continue
        value = one.value()
        for name in masked:
            if (fault := _fault(value, masks[name], one)) is not None:
                raise StructureError(f"{name}: {fault}")


def refresh(model: nn.Module) -> None:
    """Sets the attributes that hooks leave on layers to what the present parameters give."""
    for one in derived_weights(model):
        if one.hooked:
            setattr(one.module, one.name.rpartition(".")[2], one.value())


def unmaskable(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of the parameters ``names``, those of which no single numbers can be removed, and why."""
    wanted, found = set(names), {}
    for one in derived_weights(model):
        for name in wanted.intersection(one.parts):
            parameter = bare(model).get_parameter(name)
            draw = torch.Generator().manual_seed(0)
            mask = torch.rand(parameter.shape, generator=draw) < 0.5
            mask.reshape(len(mask), -1)[:, 0] = True  # no row loses everything
            before = parameter.detach().clone()
            try:
                parameter.data.copy_((torch.rand(parameter.shape, generator=draw) + 0.5) * mask)
                fault = _fault(one.value(), mask, one)
            finally:
                parameter.data.copy_(before)
            if fault is not None:
                found[name] = fault
    return found


def _fault(value: Tensor, mask: Tensor, one: Derived) -> str | None:
    advice = f"leave it out (ignore), or make {one.name} a plain parameter first ({one.removal})"
    if value.shape != mask.shape:
        return f"{one.how} computes {one.name} {tuple(value.shape)} from it, {tuple(mask.shape)}; {advice}"
    if not bool(torch.isfinite(value).all()):
        empty = (~mask).flatten(1).all(1) if mask.dim() > 1 else ~mask
        row = f"row {int(empty.nonzero()[0])} of it" if bool(empty.any()) else "it"
        return f"{row} keeps too little: {one.how} divides by its norm, which gives NaN; prune less of it, or {advice}"
    if bool((value[~mask.to(value.device)] != 0).any()):
        return f"{one.how} computes {one.name} from it, and a 0 there is no 0 in the weight; {advice}"
    return None


def _evaluated(chain: nn.Module) -> Callable[[], Tensor]:
    @torch.no_grad()
    def value() -> Tensor:
        modes = [(module, module.training) for module in chain.modules()]
        chain.eval()  # in training mode spectral_norm moves its own buffers
        try:
            found: Tensor = chain()
            return found.detach().clone()
        finally:
            for module, training in modes:
                module.training = training

    return value


def _masked(hook: BasePruningMethod, module: nn.Module) -> Callable[[], Tensor]:
    return lambda: hook.apply_mask(module).detach()


def _computed(hook: WeightNorm | SpectralNorm, module: nn.Module, *options: bool) -> Callable[[], Tensor]:
    @torch.no_grad()
    def value() -> Tensor:
        found: Tensor = hook.compute_weight(module, *options)
        return found.detach()

    return value
