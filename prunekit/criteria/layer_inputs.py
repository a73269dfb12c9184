"""What goes into a layer, as its weight meets it: rows of inputs, in bounded pieces, and sums over them.

A layer with weight ``(groups, outputs / groups, d)`` multiplies every row ``(groups, d)`` of its inputs with it, a row a sample
and position: the patches of a convolution, for instance. ``H = Σ x xᵀ`` over rows is what OBS and its kin look at, ``Σ x²`` is
enough for Wanda.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import ranks
from prunekit.errors import NonFiniteError, PrunekitError
from prunekit.measure.macs import unfused

Layer = nn.Module
WITH_INPUTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Their weights are ``(outputs, inputs / groups, ...)``."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Their weights are ``(inputs, outputs / groups, ...)``."""
PIECE = 2**23
"""Numbers in a piece of rows: 64 MiB of them in float64."""
LOOKED_AT, CLOSE = 64, 0.02
"""Rows by which a layer is told from one that computes something else, and how far what it gives may be from what its weight
says, of its largest output: more than half precision comes to."""


def handled(module: nn.Module | None) -> bool:
    """Whether a module is a layer whose ``weight`` meets rows of its inputs."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    return isinstance(module, (*WITH_INPUTS, *TRANSPOSED)) or _is_linear_by_columns(module)


def to_rows(layer: Layer, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as ``(groups, outputs / groups, d)``."""
    groups = int(getattr(layer, "groups", 1))
    if _is_linear_by_columns(layer):
        return weight.t()[None]
    if isinstance(layer, TRANSPOSED):
        reversed_ = weight.flip(list(range(2, weight.dim())))  # as it meets the patches
        found: Tensor = reversed_.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
        return found
    return weight.reshape(groups, len(weight) // groups, -1)


def from_rows(layer: Layer, rows: Tensor) -> Tensor:
    """The inverse of ``to_rows``."""
    if _is_linear_by_columns(layer):
        return rows[0].t()
    shape: torch.Size = layer.weight.shape  # type: ignore[assignment]
    if isinstance(layer, TRANSPOSED):
        apart: Tensor = rows.unflatten(2, (shape[0] // len(rows), *shape[2:])).transpose(1, 2).reshape(shape)
        return apart.flip(list(range(2, len(shape))))
    return rows.reshape(shape)


def _is_linear_by_columns(module: nn.Module | None) -> bool:
    """transformers' Conv1D: a linear layer that holds ``(inputs, outputs)``."""
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and getattr(module, "weight", torch.empty(0)).dim() == 2
    )


def layers_with_inputs(model: nn.Module, parameters: Sequence[str]) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The layers that hold each of ``parameters`` as their weight, several where it is tied; and what the others are of."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, list[Layer]] = {}
    unfit: dict[str, str] = {}
    for parameter in parameters:
        owners = [name.rpartition(".") for name, tensor in names.items() if tensor is names.get(parameter)]
        holding = [
            modules[path] for path, _, kind in owners or [parameter.rpartition(".")] if kind == "weight" and path in modules
        ]
        fitting = list({id(module): module for module in holding if handled(module)}.values())
        if fitting:
            found[parameter] = fitting
        else:
            owner = modules.get(parameter.rpartition(".")[0])
            unfit[parameter] = "no layer" if owner is None else type(owner).__name__
    return found, unfit


def input_of(inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    """What a layer is called with, by position or by name."""
    found: Tensor = inputs[0] if inputs else next(iter(keywords.values()))
    return found


@contextmanager
def reaching(layers: Mapping[str, Sequence[Layer]], see: Callable[[str, Layer, Tensor], None]) -> Iterator[None]:
    """While inside, every forward pass of a layer calls ``see(parameter name, layer, its input)``, however it is given."""
    hooks = []
    for name, holding in layers.items():
        for layer in holding:

            def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], name: str = name) -> None:
                see(name, module, input_of(inputs, keywords).detach())

            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with unfused():  # a fused encoder calls none of its layers
            yield
    finally:
        for hook in hooks:
            hook.remove()


def twins_among(layers: Mapping[str, Sequence[Layer]], run: Callable[[], None]) -> dict[str, str]:
    """Linear layers whose one input is the very tensor that an earlier one got, and that one; on all ranks the same.

    Of what some rank's samples do not reach, each layer stands for itself.

    Args:
        run: passes some of this rank's samples through the layers.
    """
    seen: dict[str, list[tuple[Tensor, int]]] = {}  # all held until the end, so that none comes to lie where another lay
    linear = {name: holding for name, holding in layers.items() if by_features(holding[0])}
    with reaching(linear, lambda name, layer, x: seen.setdefault(name, []).append((x, x._version))):
        run()
    once = [name for name, inputs in seen.items() if len(inputs) == 1]
    found: dict[str, str] = {}
    for number, name in enumerate(once):
        same = (n for n in once[:number] if n not in found and _one(seen[n][0], seen[name][0]))
        if (twin := next(same, None)) is not None:
            found[name] = twin
    every = ranks.gathered(found)
    return {name: twin for name, twin in found.items() if all(theirs.get(name) == twin for theirs in every)}


def _one(given: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    """Whether two layers met the same numbers in memory, with nothing written there in between."""
    (x, version), (y, then) = given, other
    return bool(x.numel()) and x.data_ptr() == y.data_ptr() and (version, x.shape, x.stride()) == (then, y.shape, y.stride())


@contextmanager
def watching(layers: Mapping[str, Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While inside, every forward pass of a layer calls ``see(parameter name, rows)`` for each piece of its ``rows``."""

    def pieces(name: str, layer: Layer, x: Tensor) -> None:
        for piece in rows(layer, x):
            see(name, piece)

    with reaching({name: [layer] for name, layer in layers.items()}, pieces):
        yield


def by_features(module: nn.Module) -> bool:
    """Whether a layer's rows are its inputs along their last axis, whatever its own sizes are."""
    return isinstance(module, nn.Linear) or _is_linear_by_columns(module)


def rows(layer: Layer, x: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Inputs as they meet the weight, ``(groups, rows, d)``, in pieces of at most ``PIECE`` numbers or a row."""
    groups = getattr(layer, "groups", 1)
    if by_features(layer):
        whole, axes = x.reshape(-1, x.shape[-1]), 1
    else:
        whole, axes = _patches(layer, x)
    for piece in _pieces(whole, axes):
        yield piece.reshape(-1, groups, prod(whole.shape[axes:]) // groups).transpose(0, 1).contiguous().to(dtype)


def _pieces(whole: Tensor, axes: int) -> Iterator[Tensor]:
    """Parts along the first of ``axes`` axes, along the next where one index of it is too much; a view each."""
    if whole.numel() <= PIECE or not axes:
        yield whole
    elif (each := whole[0].numel()) > PIECE:
        for part in whole:
            yield from _pieces(part, axes - 1)
    else:
        yield from whole.split(max(1, PIECE // each))


def _patches(layer: Any, x: Tensor) -> tuple[Tensor, int]:
    """``(samples, *positions, channels, *kernel)``, a view of the padded inputs, and how many axes count rows."""
    if x.dim() == layer.weight.dim() - 1:
        x = x[None]  # without a batch axis
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, TRANSPOSED):  # an ordinary convolution of inputs with noughts between them, its kernel reversed
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
        where: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
        spread[where] = x
        sides = [
            side
            for k, d, p, o in zip(kernel, dilation, layer.padding, layer.output_padding, strict=True)
            for side in (d * (k - 1) - p, d * (k - 1) - p + o)
        ]
        pairs = list(zip(sides[::2], sides[1::2], strict=True))
        x, stride = F.pad(spread, [side for pair in reversed(pairs) for side in pair]), (1,) * len(kernel)
    else:
        sides = layer._reversed_padding_repeated_twice
        x = F.pad(x, sides) if layer.padding_mode == "zeros" else F.pad(x, sides, mode=layer.padding_mode)
    count = len(kernel)
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(x.shape[2:], kernel, dilation, stride, strict=True)]
    steps = x.stride()[2:]
    along = [a * s for a, s in zip(steps, stride, strict=True)]
    inside = [a * d for a, d in zip(steps, dilation, strict=True)]
    view = x.as_strided((len(x), *sizes, x.shape[1], *kernel), (x.stride(0), *along, x.stride(1), *inside), x.storage_offset())
    return view, 1 + count


def output_rows(layer: Layer, output: Tensor) -> Tensor:
    """What a layer gave, or a tensor of that shape, as its rows are: ``(groups, rows, outputs / groups)``."""
    groups = int(getattr(layer, "groups", 1))
    axis = -1 if by_features(layer) else output.dim() + 1 - layer.weight.dim()  # type: ignore[operator]
    return output.movedim(axis, -1).reshape(-1, groups, output.shape[axis] // groups).transpose(0, 1)


def unlike_their_weights(layers: Mapping[str, Sequence[Layer]], run: Callable[[], Any]) -> set[str]:
    """Layers that give anything but their rows times the weight, and the bias: whose forward, or a hook, does something else.

    Args:
        run: passes some samples through the layers; of each call some rows are looked at.
    """
    found: set[str] = set()

    def look(name: str, module: Layer, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not isinstance(output, Tensor) or not _as_weighted(module, input_of(inputs, keywords), output):
            found.add(name)

    with ExitStack() as exits:
        for name, holding in layers.items():
            for layer in holding:
                hook = layer.register_forward_hook(partial(look, name), with_kwargs=True)
                exits.callback(hook.remove)
        exits.enter_context(unfused())
        run()
    return found


def _as_weighted(layer: Any, x: Tensor, output: Tensor) -> bool:
    whole, axes = (x.reshape(-1, x.shape[-1]), 1) if by_features(layer) else _patches(layer, x)
    given = output_rows(layer, output)
    if given.shape[1] != prod(whole.shape[:axes]):
        return False
    if not given.numel():  # a router sent nothing
        return True
    some = next(rows(layer, x, torch.float32))[:, :LOOKED_AT]
    given = given[:, : some.shape[1]].float()
    if not bool(given.isfinite().all()):
        return True
    made = some @ to_rows(layer, layer.weight).float().transpose(1, 2)
    if layer.bias is not None:
        made = made + layer.bias.float().reshape(len(made), 1, -1)
    return bool((made - given).abs().max() <= CLOSE * given.abs().max())


def of_squares(rows: Tensor) -> Tensor:
    """``Σ x²``, ``(groups, d)``."""
    return rows.square().sum(1)


def of_products(rows: Tensor) -> Tensor:
    """``Σ x xᵀ``, ``(groups, d, d)``."""
    return rows.transpose(1, 2) @ rows


@contextmanager
def summing(layers: Mapping[str, Sequence[Layer]], what: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """While inside, every forward pass adds ``what`` of its layers' rows; parameter name -> sum."""
    sums: dict[str, Tensor] = {}

    def add(name: str, layer: Layer, x: Tensor) -> None:
        for piece in rows(layer, x):
            found = what(piece)
            if name in sums:
                sums[name].add_(found)
            else:
                sums[name] = found

    with reaching(layers, add):
        yield sums


def add_up(sums: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float64) -> None:
    """Adds up over all ranks what ``summing`` gave each of its own samples; a layer may be reached by some ranks' alone.

    Args:
        device, dtype: of sums, which a rank may have none of.
    """
    if ranks.size() == 1:
        return
    shapes: dict[str, list[int]] = {}
    for theirs in ranks.gathered({name: list(found.shape) for name, found in sums.items()}):
        shapes |= theirs
    for name, shape in shapes.items():
        if name not in sums:
            sums[name] = torch.zeros(shape, dtype=dtype, device=device)
    ranks.add_up(sums[name] for name in shapes)


def not_finite(name: str) -> NonFiniteError:
    """What is raised where the inputs of a parameter's layer are no numbers."""
    return NonFiniteError(f"{name}: its layer's inputs are NaN or Inf for some of the samples; look at the data")


def refuse_unfit(unfit: Mapping[str, str], what: str) -> None:
    """Raises PrunekitError that names every parameter that ``what`` cannot score, and what it is of."""
    if unfit:
        listed = ", ".join(f"{name} ({why})" for name, why in unfit.items())
        raise PrunekitError(
            f"{what} looks at the inputs of linear and convolution weights, and cannot score {listed}; score "
            f"{'this' if len(unfit) == 1 else 'these'} by magnitude (--skip-unfit, in Python skip_unfit=True), or leave out "
            f"(import and compress --ignore, in a recipe prunable: {{ignore: {list(unfit)}}})"
        )


def unreached(sums: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """Parameters whose own layer's forward was never called."""
    return {name: "no input reached its layer" for name in parameters if name not in set(sums)}
