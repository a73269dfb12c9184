"""A model copied: also one that keeps tensors which torch cannot copy, such as the masked weight of torch.nn.utils.prune."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import StructureError
from prunekit.trajectory.bare import bare


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the model inside its wrappers.

    Tensors that hang on the model beside its parameters and were computed from them (a masked or normalised weight, a kept
    activation) are copied as values: torch refuses to copy their graph.

    Raises:
        StructureError: something in the model cannot be copied; names the module.
    """
    model = bare(model)
    with _values_only(model):
        try:
            return copy.deepcopy(model)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a user's module holds
            raise StructureError(
                f"the model cannot be copied (copy.deepcopy): {_culprit(model)} holds something that cannot "
                f"({' '.join(str(error).split())[:120]}); prunekit works on copies"
            ) from None


@contextmanager
def _values_only(model: nn.Module) -> Iterator[None]:
    """Computed tensors among the modules' plain attributes are their bare values inside."""
    stashed: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                stashed.append((vars(module), key, value))
    for attributes, key, value in stashed:
        attributes[key] = value.detach()
    try:
        yield
    finally:
        for attributes, key, value in stashed:
            attributes[key] = value


def _culprit(model: nn.Module) -> str:
    """The innermost module that cannot be copied alone."""
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy(module)
        except Exception:  # the same fault, looked for in a smaller part
            return f"{name or 'it'} ({type(module).__name__})"
    return f"it ({type(model).__name__})"
