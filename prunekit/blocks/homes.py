"""Where a model's weights lie while nothing computes with them: in memory, or in files from which a block is fetched at its turn.

Both are looked at in one way, so that what prunes or passes through blocks is the same code. Files are accelerate's business: its
hooks read a layer's weights from safetensors when the layer is called, and drop them again. Here a whole block stays meanwhile,
and what pruning made of it goes to a file of its own, from which it comes from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit.errors import ArtifactError, UsageError


class Home(Protocol):
    """Attributes: ``device``, where blocks compute; ``inputs``, where the model takes its inputs."""

    device: torch.device
    inputs: torch.device

    def present(self, module: nn.Module) -> AbstractContextManager[None]:
        """While inside, the module's weights are on ``device``."""
        ...

    def settle(self, module: nn.Module) -> None:
        """What a present module's weights are now, they stay."""
        ...


class InMemory:
    """Weights that stay in the model, and move to ``device`` at their turn."""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.inputs = next(model.parameters()).device
        self.device = self.inputs if device is None else device

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        home = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), self.device)
        if home == self.device:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to(home)

    def settle(self, module: nn.Module) -> None:
        pass


class Viewed:
    """Weights that are only read: each comes to ``device`` at its turn as a copy, and lies where it lay.

    Args:
        device: where everything computes.
        held: tensors of the model that lie on accelerators for good, as copies, and where.
    """

    def __init__(self, device: torch.device, held: Iterable[tuple[Tensor, torch.device]] = ()) -> None:
        self.device = self.inputs = device
        self._held = {id(tensor): tensor.data.to(place) for tensor, place in held}

    def present(self, module: nn.Module) -> AbstractContextManager[None]:
        return self.here([*module.parameters(), *module.buffers()])

    @contextmanager
    def here(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """While inside, these parameters and buffers are on ``device``."""
        away = [(tensor, tensor.data) for tensor in tensors if tensor.device != self.device]
        for tensor, data in away:
            tensor.data = self._held.get(id(tensor), data).to(self.device)
        try:
            yield
        finally:
            for tensor, data in away:
                tensor.data = data

    def settle(self, module: nn.Module) -> None:
        raise AssertionError("nothing changes these weights")


class InFiles:
    """Weights that accelerate's hooks read from safetensors, layer by layer.

    Args:
        model: as ``from_pretrained`` gives it with all weights on disk (``prunekit.huggingface.load_model``, ``offload``).
        device: where everything computes.
        folder: where files of changed blocks go.
    """

    def __init__(self, model: nn.Module, device: torch.device, folder: Path) -> None:
        self.device = self.inputs = device
        self._folder = folder
        self._names = {module: name for name, module in model.named_modules()}
        lost = next((name for module, name in self._names.items() if _lacks(module)), None)
        if lost is not None:
            raise UsageError(f"the weights of {lost or 'the model'} are in no file that can be read layer by layer")
        for module in model.modules():
            if (hook := _hook(module)) is not None:
                hook.execution_device = device
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(device)

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        fetched = []
        once: dict[int, nn.Parameter] = {}
        try:
            for layer in module.modules():
                hook = _hook(layer)
                if hook is not None and hook.offload:
                    hook.pre_forward(layer)
                    for key, tensor in layer._parameters.items():
                        if tensor is not None:  # its numbers in memory, since safetensors may give a view of the file
                            entry = _entry(hook, key)
                            if id(entry) not in once:
                                once[id(entry)] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
                            layer._parameters[key] = once[id(entry)]
                    hook.offload = False  # its calls neither read the weights anew nor drop them
                    fetched.append((layer, hook))
            yield
        finally:
            for layer, hook in fetched:
                hook.offload = True
                hook.post_forward(layer, None)

    def settle(self, module: nn.Module) -> None:
        path = self._folder / f"{self._names[module]}.safetensors"
        state: dict[str, Tensor] = {}
        for layer in module.modules():
            for key, tensor in layer._parameters.items():
                if tensor is not None and (hook := _hook(layer)) is not None:
                    entry = _entry(hook, key)
                    if entry["safetensors_file"] != str(path):  # a tied one has the same entry
                        name = f"{self._names[layer]}.{key}"
                        entry |= {"safetensors_file": str(path), "weight_name": name}
                        state[name] = tensor.detach().cpu().contiguous()
        try:
            save_file(state, path)
        except SafetensorError as error:  # of a full disk, too
            raise ArtifactError(f"{path}: could not be written ({error})") from None


def _entry(hook: Any, key: str) -> dict[str, Any]:
    """Where the hook reads its layer's parameter from; tied parameters have the same."""
    found: dict[str, Any] = hook.weights_map.dataset.index[f"{hook.weights_map.prefix}{key}"]
    return found


def _hook(module: nn.Module) -> Any:
    """accelerate's hook that puts the module's weights in place; None where it has none."""
    hook = getattr(module, "_hf_hook", None)
    return hook if hasattr(hook, "execution_device") else None


def _lacks(module: nn.Module) -> bool:
    hook = _hook(module)
    held = any(tensor is not None and tensor.is_meta for tensor in module._parameters.values())
    return held and (hook is None or not hook.offload or not hasattr(hook.weights_map, "dataset"))
