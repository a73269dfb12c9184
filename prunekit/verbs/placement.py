"""eval --device-map: models whose weights accelerate spreads over devices, main memory and disk while they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunekit import temporary
from prunekit.bounded import parsed
from prunekit.errors import UsageError, nearest, theirs
from prunekit.huggingface import quietly
from prunekit.imports import needed

AUTO = "auto"
DEVICES = ("cpu", "disk")
"""Places beside accelerators, whose names are numbers or ``cuda:1``."""

ADDED = ("forward", "to", "cuda", "hf_device_map")
"""Attributes that accelerate puts on modules and leaves there."""

DeviceMap = str | Mapping[str, str | int]
"""``auto``, or module -> device; a module's stands for all inside that are not named; ``""`` is the whole model."""


def device_map_of(text: str) -> DeviceMap:
    """What ``--device-map`` says.

    Raises:
        UsageError: it is neither ``auto`` nor a JSON object of modules and devices.
    """
    if text == AUTO:
        return AUTO
    try:
        found = parsed(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise UsageError(f'--device-map is {text[:60]!r}; it must be auto, or a JSON object such as \'{{"": "disk"}}\'')
    for name, device in found.items():
        if isinstance(device, bool) or not isinstance(device, str | int):
            raise UsageError(f"--device-map: {name!r} is on {device!r:.40}; a device is cpu, disk, 0 or cuda:1")
        if device not in DEVICES:
            _check_device(name, device)
    return found


def _check_device(name: str, device: str | int) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device-map: {name!r} is on {device!r}, which cannot be used here ({error!s:.100})") from None


@contextmanager
def placed_on(models: Sequence[nn.Module], device: torch.device, device_map: DeviceMap | None) -> Iterator[None]:
    """While inside, models compute on ``device``, or by a map where accelerate's hooks bring every layer's weights.

    Args:
        models: on the CPU, where they are again afterwards; ``auto`` shares what memory is free out evenly among them.

    Raises:
        UsageError: accelerate is not installed, or the map does not fit a model.
    """
    try:
        if device_map is None:
            for model in models:
                model.to(device)
            yield
        else:
            with _dispatched(models, device_map):
                yield
    finally:
        for model in models:
            model.to("cpu")


@contextmanager
def _dispatched(models: Sequence[nn.Module], device_map: DeviceMap) -> Iterator[None]:
    accelerate = needed("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    places = [places_of(device_map, model, len(models)) for model in models]
    modules = [module for model in models for module in model.modules()]
    before = [
        (module, dict(module._parameters), dict(module._buffers), {key: vars(module).get(key) for key in ADDED})
        for module in modules
    ]
    with temporary.folder() as folder:
        try:
            with theirs("placing the model with accelerate"), quietly():
                for number, (model, where) in enumerate(zip(models, places, strict=True)):
                    accelerate.dispatch_model(model, where, offload_dir=f"{folder}/{number}", force_hooks=True)
            yield
        finally:
            for model in models:
                remove_hook_from_submodules(model)
            for module, parameters, buffers, added in before:  # the very tensors, so that what is tied stays so
                module._parameters.update(parameters)
                module._buffers.update(buffers)
                for key, value in added.items():
                    if value is None:
                        vars(module).pop(key, None)
                    else:
                        vars(module)[key] = value


def places_of(device_map: DeviceMap, model: nn.Module, models: int) -> dict[str, Any]:
    """Module -> device, none inside another, as accelerate takes it.

    Args:
        models: that share what is free, where the map is ``auto``.

    Raises:
        UsageError: accelerate is not installed, or the map does not fit the model.
    """
    accelerate = needed("accelerate")
    chosen = {} if isinstance(device_map, str) else dict(device_map)
    if isinstance(device_map, str):
        free = accelerate.utils.get_max_memory()
        whole = {type(block).__name__ for held in model.modules() if isinstance(held, nn.ModuleList) for block in held}
        share = {device: amount // models for device, amount in free.items()}
        chosen = accelerate.infer_auto_device_map(model, share, no_split_module_classes=sorted(whole))
    modules = [name for name, _ in model.named_modules()]
    for name in chosen:
        if name not in modules and name not in dict(model.named_parameters()):
            raise UsageError(f"--device-map: {name!r} is no module of the model; {nearest(name, modules)}")
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    by_tensor = {}
    for tensor in tensors:
        above = [name for name in chosen if not name or tensor == name or tensor.startswith(f"{name}.")]
        if not above:
            raise UsageError(f'--device-map: says nothing of {tensor}; with "": "cpu" beside the others the rest is on the CPU')
        by_tensor[tensor] = chosen[max(above, key=len)]
    return dict(_apart(model, "", by_tensor))


def _apart(module: nn.Module, name: str, by_tensor: Mapping[str, str | int]) -> Iterator[tuple[str, str | int]]:
    """The largest modules whose tensors share one device; below the whole model, which accelerate does not put on disk."""
    prefix = f"{name}." if name else ""
    devices = {device for tensor, device in by_tensor.items() if tensor.startswith(prefix)}
    if name and len(devices) == 1:
        yield name, devices.pop()
        return
    for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield f"{prefix}{key}", by_tensor[f"{prefix}{key}"]
    for key, child in module.named_children():
        yield from _apart(child, f"{prefix}{key}", by_tensor)
