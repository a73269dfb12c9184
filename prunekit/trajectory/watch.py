"""What of a model moves beside the recorded steps: weights set between two steps, and parameters that are not recorded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.errors import ArtifactError, UsageError
from prunekit.trajectory.bare import local, named_tensors
from prunekit.trajectory.layout import ORIGINAL, Layout, mask_of

ADVICE = (
    "what is recorded is fixed when recording begins; unfreeze it before that (requires_grad_), or begin a recording of its "
    "own where it starts to be trained"
)


class Watch:
    """Looks at a model while it is recorded.

    Args:
        layout: the coordinates that this process records; of a tensor that is spread over processes, its own rows.
        fixed: the file with what lies beside them, as it was in the beginning.
        names: every tensor that is recorded, also by other processes; None for those of ``layout``.
    """

    def __init__(self, model: nn.Module, layout: Layout, fixed: Path, names: Collection[str] | None = None) -> None:
        self.layout, self.fixed = layout, fixed
        # Looked up once: walking the modules at every step would cost more than copying the weights. The dictionary is held,
        # not the tensor: a loop may put another tensor into the parameter or buffer.
        owners = _owners(model)
        self._shapes = {entry.name: torch.Size(entry.shape) for entry in layout}
        self._places = [(entry, *owners[entry.name]) for entry in layout]
        self._masks = {e.name: owners[mask_of(e.name)] for e in layout if e.name.endswith(ORIGINAL) and mask_of(e.name) in owners}
        recorded = {id(owners[name][0][owners[name][1]]) for name in (self._shapes if names is None else names)}
        self._frozen = [(name, p, _stand(p)) for name, p in model.named_parameters() if id(p) not in recorded]
        self._known = {*self._shapes, *(names or ()), *(name for name, *_ in self._frozen)}
        self._model = model
        self._kept: list[Tensor] = []

    def look_again(self) -> None:
        """Finds every tensor anew, also in modules that were put in the place of others.

        Raises:
            ArtifactError: a recorded tensor is gone, or one is there that was not.
        """
        owners = _owners(self._model)
        if new := [name for name, p in self._model.named_parameters() if name not in self._known]:
            raise ArtifactError(f"{new[0]} was not in the model when recording began; record it anew")
        self._places = [(entry, *owners.get(entry.name, ({}, entry.name))) for entry, *_ in self._places]

    def copy_to(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The present state into ``row`` ``(P,)``."""
        flat = torch.from_numpy(row)
        for entry, owner, key in self._places:
            self._copy(flat, entry.span, entry.name, self._tensor(entry.name, owner, key))
        return row

    def copy_kept(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The state when ``keep`` was called last, into ``row`` ``(P,)``."""
        flat = torch.from_numpy(row)
        for (entry, *_), tensor in zip(self._places, self._kept, strict=True):
            self._copy(flat, entry.span, entry.name, tensor)
        return row

    def keep(self) -> None:
        """Remembers the present state as what was recorded last."""
        if not self._kept:
            self._kept = [torch.empty_like(self._tensor(e.name, owner, key)) for e, owner, key in self._places]
        if self._kept:
            torch._foreach_copy_(self._kept, [self._tensor(entry.name, owner, key) for entry, owner, key in self._places])

    def moved(self, buffers: bool = False) -> list[str]:
        """Names of parameters, with ``buffers`` of buffers too, that are not as ``keep`` left them."""
        found = []
        for kept, (entry, owner, key) in zip(self._kept, self._places, strict=True):
            if (buffers or entry.kind == "parameter") and not _equal(kept, self._tensor(entry.name, owner, key).to(kept)):
                found.append(entry.name)
        return found

    @torch.no_grad()
    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses a step of ``optimizer`` that would move what is not recorded.

        Raises:
            UsageError: names the parameter.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter, before in self._frozen:
            if parameter.grad is not None and id(parameter) in held and bool(local(parameter.grad).any()):
                raise UsageError(f"{name} was frozen when recording began and is trained now: {ADVICE}")
            if _stand(parameter) != before:
                self.check_frozen()
                self._frozen = [(n, p, _stand(p)) for n, p, _ in self._frozen]
                break

    @torch.no_grad()
    def check_frozen(self) -> None:
        """Raises UsageError when a parameter that is not recorded is not what it was in the beginning."""
        if not self._frozen:
            return
        start = checkpoint.read_tensors(self.fixed)
        for name, parameter, _ in self._frozen:
            before = start.get(name)
            if before is not None and not torch.equal(before, local(parameter.detach()).cpu()):
                raise UsageError(f"{name} was frozen when recording began and has moved since: {ADVICE}")

    @torch.no_grad()
    def end_of_fixed(self) -> dict[str, Tensor]:
        """Buffers beside the path that are not what they were in the beginning (counters of batches), as they are now."""
        start, now = checkpoint.read_tensors(self.fixed), named_tensors(self._model)
        changed = {}
        for name, before in start.items():
            tensor = now.get(name)
            if tensor is None:
                raise ArtifactError(f"{name} was in the model when recording began and is not any more")
            if not torch.equal(before, own := local(tensor.detach()).cpu()):
                changed[name] = own.clone()
        return changed

    def _copy(self, flat: Tensor, span: slice, name: str, tensor: Tensor) -> None:
        flat[span].copy_(tensor.reshape(-1))
        if name in self._masks:
            owner, key = self._masks[name]
            flat[span].mul_(owner[key].reshape(-1).to(flat))

    @torch.no_grad()
    def _tensor(self, name: str, owner: dict[str, Any], key: str) -> Tensor:
        tensor = owner.get(key)
        tensor = local(tensor) if isinstance(tensor, Tensor) else tensor
        if not isinstance(tensor, Tensor) or tensor.shape != self._shapes[name]:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else "gone"
            raise ArtifactError(f"{name} was {tuple(self._shapes[name])} when recording began and is {found} now; record it anew")
        return tensor.detach()


@torch.no_grad()
def _stand(parameter: nn.Parameter) -> tuple[int, int]:
    """Changes whenever the parameter's numbers may have."""
    own = local(parameter)
    return own._version, own.data_ptr()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers; NaN in both is the same, and another's to tell of."""
    return torch.equal(a, b) or torch.equal(a.double().nan_to_num(), b.double().nan_to_num())


def _owners(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """By name, the table of its module that holds the tensor, and its key there."""
    found = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key in table:
                found[f"{path}.{key}" if path else key] = (table, key)
    return found
