"""A run that leaves nothing behind: tensors that a forward pass keeps in its modules' plain attributes are taken out again.

Some modules keep what they computed from their weights and use it again (a bias table of attention, a normalised weight). Such
a cache is wrong as soon as the weights are others, and prunekit looks at one model at many weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

OWN = frozenset(vars(nn.Module()))  # torch's own attributes: parameters, buffers, modules, hooks, mode
CONTAINERS = (dict, list)
MISSING = object()


@contextmanager
def traceless(model: nn.Module) -> Iterator[list[str]]:
    """Plain attributes in which tensors come, go or change inside are put back as they were.

    Yields:
        a list that holds their names afterwards; counters and whatever else is no tensor stays.
    """
    left: list[str] = []
    before = [
        (module, dict(vars(module)), {key: copy.copy(value) for key, value in vars(module).items() if _container(key, value)})
        for module in model.modules()
    ]
    try:
        yield left
    finally:
        for module, values, contents in before:
            _put_back(vars(module), values, contents, left)


def computed(model: nn.Module) -> list[Tensor]:
    """Tensors in plain attributes that were computed with a graph, which torch does not copy."""
    return [
        tensor
        for module in model.modules()
        for key, value in vars(module).items()
        if key not in OWN
        for tensor in _tensors(value)
        if tensor.grad_fn is not None
    ]


def keeps_tensors(model: nn.Module) -> bool:
    """Whether a module holds a tensor that is neither parameter nor buffer."""
    return any(
        next(_tensors(value), None) is not None
        for module in model.modules()
        for key, value in vars(module).items()
        if key not in OWN and key != "_flat_weights"  # a recurrent layer's list of its own parameters
    )


def _container(key: str, value: Any) -> bool:
    return key not in OWN and isinstance(value, CONTAINERS)


def _put_back(attributes: dict[str, Any], values: dict[str, Any], contents: dict[str, Any], left: list[str]) -> None:
    for key in [key for key in (*attributes, *(values.keys() - attributes.keys())) if key not in OWN]:
        old, new = values.get(key, MISSING), attributes.get(key, MISSING)
        if key in contents and not _same(old, contents[key]) and (_holds(old) or _holds(contents[key])):
            _refill(old, contents[key])
            left.append(key)
        if new is not old and (_holds(new) or _holds(old)):
            left.append(key)
            if old is MISSING:
                del attributes[key]
            else:
                attributes[key] = old


def _same(container: Any, kept: Any) -> bool:
    """Whether a container holds the very objects that it held."""
    if len(container) != len(kept):
        return False
    if isinstance(container, dict):
        return all(key in kept and value is kept[key] for key, value in container.items())
    return all(a is b for a, b in zip(container, kept, strict=True))


def _refill(container: Any, kept: Any) -> None:
    if isinstance(container, dict):
        container.clear()
        container.update(kept)
    else:
        container[:] = kept


def _holds(value: Any) -> bool:
    return next(_tensors(value), None) is not None


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for inner in value:
            yield from _tensors(inner, depth - 1)
