"""A model copied: also one that keeps tensors which torch cannot copy, such as the masked weight of torch.nn.utils.prune."""

from __future__ import annotations

import copy
from types import FunctionType, MethodType

import torch
from torch import nn

from prunekit.errors import StructureError, quoted
from prunekit.traceless import computed, keeps_tensors
from prunekit.trajectory.bare import bare


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the model inside its wrappers.

    Tensors that hang on the model beside its parameters and were computed from them (a masked or normalised weight, a kept
    activation) are copied as values: torch refuses to copy their graph. A forward that accelerate wrapped for mixed precision is
    the layer's own again in the copy: the wrapper would go on calling the original.

    Raises:
        StructureError: something in the model cannot be copied; names the module.
    """
    model = bare(model)
    plain = _wrapped_forwards(model)
    values = {id(tensor): tensor.detach().clone() for tensor in computed(model)}
    try:
        found = copy.deepcopy(model, values)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a user's module holds
        raise StructureError(
            f"the model cannot be copied (copy.deepcopy): {_culprit(model)} holds something that cannot "
            f"({quoted(error, 120)}); prunekit works on copies"
        ) from None
    for name in plain:
        vars(found.get_submodule(name)).pop("forward")
    if keeps_tensors(found) and not any(module.training for module in found.modules()):
        found.train().eval()  # modules that keep what they computed from their weights drop it when their mode changes
    return found


def _wrapped_forwards(model: nn.Module) -> list[str]:
    """Modules whose forward is a function around their own one, which a copy would still call.

    Raises:
        StructureError: it is another function that holds a module of this model.
    """
    found, modules = [], set(model.modules())
    for name, module in model.named_modules():
        forward = outer = vars(module).get("forward")
        if not isinstance(outer, FunctionType):
            continue
        while hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        if isinstance(forward, MethodType) and forward.__self__ is module and forward.__name__ == "forward":
            found.append(name)
            continue
        held = [cell.cell_contents for cell in outer.__closure__ or ()]
        held += [getattr(value, "__self__", None) for value in held]
        if any(isinstance(value, nn.Module) and value in modules for value in held):
            raise StructureError(
                f"{name or 'the model'} ({type(module).__name__}) has a forward put in its place that holds a module of this "
                "model, so a copy would go on calling the original; write it as a method (types.MethodType)"
            )
    return found


def _culprit(model: nn.Module) -> str:
    """The innermost module that cannot be copied alone."""
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy(module)
        except Exception:  # the same fault, looked for in a smaller part
            return f"{name or 'it'} ({type(module).__name__})"
    return f"it ({type(model).__name__})"
