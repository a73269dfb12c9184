"""What a batch is: what the model is called with, and what its answer is compared with.

A batch is a pair ``(inputs, labels)`` everywhere inside prunekit. ``inputs`` says how the model is called: a tensor as
``model(x)``, a tuple or list as ``model(*x)``, a mapping as ``model(**x)``. ``labels`` is whatever losses and targets need:
a tensor, a nest of them, or None. A task makes that pair of what a user's loader gives (``prunekit.task``).

Both are nests of tuples, lists and mappings. A tensor in a nest has samples on its first axis when that has the batch's size;
any other (a table of positions), and whatever is no tensor, is shared by all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError
from prunekit.traceless import traceless

Inputs = Any
"""What a model is called with: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
Labels = Any
"""What losses and targets look at beside the outputs: a tensor, a nest of tensors, or None."""
Batch = tuple[Inputs, Labels]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's answer: ``model(x)``, ``model(*x)`` or ``model(**x)`` by what ``inputs`` is.

    What it keeps of its weights meanwhile is gone again (``prunekit.traceless``); training calls ``called``.
    """
    with traceless(model):
        return called(model, inputs)


def called(model: nn.Module, inputs: Inputs) -> Any:
    """The same, as a user's own loop would."""
    positional, keywords = arguments(inputs)
    return model(*positional, **keywords)


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model's forward."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first tensor is, or what accelerate computes on where it placed the model."""
    placed = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if placed is not None:
        return torch.device(placed)
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def mapped(nest: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nest with ``change`` applied to every tensor; mappings come back as plain dicts."""
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, Mapping):
        return {key: mapped(value, change) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [mapped(value, change) for value in nest]
        if isinstance(nest, tuple) and hasattr(nest, "_fields"):
            return type(nest)(*parts)
        return type(nest)(parts) if type(nest) in (tuple, list) else parts
    return nest


def named(nest: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a nest by its dotted path; a tensor alone has the path ``name``."""
    if isinstance(nest, Tensor):
        return {name: nest}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(nest, Mapping):
        items = nest.items()
    elif isinstance(nest, tuple | list):
        items = enumerate(nest)
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= named(value, f"{name}.{key}" if name else str(key))
    return found


def leaves(nest: Any) -> list[Tensor]:
    """Every tensor of a nest, in order."""
    return list(named(nest).values())


def answers(answer: Any) -> list[Tensor]:
    """Every tensor in what a model returned: a tensor, a tuple, a mapping, a dataclass, or several of them nested.

    Caches (key and value states that grow from call to call) are not answers and are left out.
    """
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, Mapping):
        return [t for key, value in answer.items() if key != "past_key_values" for t in answers(value)]
    if isinstance(answer, tuple | list):
        return [t for value in answer for t in answers(value)]
    if hasattr(answer, "__dataclass_fields__"):
        return [t for key in answer.__dataclass_fields__ if key != "past_key_values" for t in answers(getattr(answer, key))]
    return []


def size(inputs: Inputs) -> int:
    """How many samples a nest holds: the first axis of its first tensor that has one.

    Raises:
        UsageError: it holds no tensor with an axis.
    """
    for tensor in leaves(inputs):
        if tensor.dim():
            return len(tensor)
    raise UsageError(f"a batch holds no tensor with samples on its first axis, but {type(inputs).__name__}")


def by_sample(nest: Any, samples: int) -> Any:
    """The same nest with 0 for a tensor that has ``samples`` on its first axis, and None for what is shared (``vmap``'s axes)."""
    return _replaced(nest, lambda leaf: 0 if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples else None)


def take(nest: Any, where: slice | Tensor | Iterable[int], samples: int | None = None) -> Any:
    """Some samples of a nest, in the order of ``where``; what is shared stays as it is.

    Args:
        samples: how many the nest holds, where that cannot be told from the nest itself (labels beside inputs).
    """
    if nest is None:
        return None
    count = size(nest) if samples is None else samples
    index: slice | Tensor = where if isinstance(where, slice | Tensor) else torch.as_tensor(list(where))

    def some(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != count:
            return tensor
        return tensor[index] if isinstance(index, slice) else tensor[index.to(tensor.device)]

    return mapped(nest, some)


def taken(batch: Batch, where: slice | Tensor | Iterable[int]) -> Batch:
    """Some samples of a batch."""
    index = where if isinstance(where, slice | Tensor) else torch.as_tensor(list(where))
    samples = size(batch[0])
    return take(batch[0], index, samples), take(batch[1], index, samples)


def to(nest: Any, device: torch.device | str) -> Any:
    """The same nest on ``device``."""
    return mapped(nest, lambda tensor: tensor.to(device))


def fresh(nest: Any) -> Any:
    """The same nest in tensors of its own, which a model may change in place (``x += …``) while the samples stay as they are."""
    return mapped(nest, Tensor.clone)


def split(batch: Batch, most: int) -> Iterator[Batch]:
    """The batch in parts of at most ``most`` samples, in order."""
    samples = size(batch[0])
    for begin in range(0, samples, most):
        yield taken(batch, slice(begin, min(begin + most, samples)))


def joined(nests: list[Any], sizes: list[int] | None = None) -> Any:
    """One nest of the samples of several, in order; what is shared is the first one's.

    Args:
        sizes: how many samples each holds, where that cannot be told from the nests themselves (labels beside inputs).
    """
    first = nests[0]
    if len(nests) == 1 or first is None:
        return first
    counts = [size(nest) for nest in nests] if sizes is None else sizes
    parts = iter(list(zip(*(leaves(nest) for nest in nests), strict=True)))

    def one(tensor: Tensor) -> Tensor:
        same = next(parts)
        whole = all(t.dim() and len(t) == count for t, count in zip(same, counts, strict=True))
        return torch.cat(list(same)) if whole else tensor

    return mapped(first, one)


def float64(nest: Any) -> Any:
    """The same nest with floating-point tensors in double precision."""
    return mapped(nest, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def described(inputs: Inputs) -> str:
    """Shapes and types of a nest, for messages: ``input_ids (2, 16) int64, attention_mask (2, 16) int64``."""
    parts = [
        f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}".strip()
        for name, tensor in named(inputs).items()
    ]
    return ", ".join(parts) if parts else type(inputs).__name__


def _replaced(nest: Any, change: Callable[[Any], Any]) -> Any:
    """Like ``mapped``, of every leaf: what is no tensor too."""
    if isinstance(nest, Mapping):
        return {key: _replaced(value, change) for key, value in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [_replaced(value, change) for value in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    return change(nest)
