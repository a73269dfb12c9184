"""score --device-map: a model whose weights lie in its run's recording, or on accelerators, and compute a block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.blocks import Row, Viewed
from prunekit.criteria import Evidence
from prunekit.data import Samples
from prunekit.errors import ArtifactError, UsageError
from prunekit.imports import needed
from prunekit.trajectory.layout import as_path, path_dtype
from prunekit.verbs.placement import DEVICES, DeviceMap, places_of
from prunekit.verbs.run_folder import Run


class SpreadRun(Run):
    """A run whose model's weights are views of the recorded state, as it lies on the disk, and are read as they are used.

    Args:
        device_map: which of them lie on accelerators, for good. The first of these computes, or the CPU where there is none; what
            is on ``cpu`` or ``disk``, which are the same here, comes there at its turn.

    Raises:
        UsageError: accelerate is not installed, or the run has a training path.
    """

    def __init__(self, path: str | Path, device_map: DeviceMap) -> None:
        super().__init__(path)
        needed("accelerate")
        self._map = device_map
        if len(self.trajectory):
            raise UsageError(
                "--device-map: this run has a training path, whose states are looked at as one vector on one device; leave "
                "--device-map out, which is for runs of one checkpoint"
            )

    @cached_property
    def model(self) -> nn.Module:
        """The dense model, in evaluation mode, computing in the recording's type."""
        trajectory = self.trajectory
        model = self._built()
        self._half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
        hold(model, {**trajectory.fixed, **trajectory.layout.views(trajectory.state(-1))})
        trajectory.layout.check(model)
        as_path(model, path_dtype(model))
        return model.eval()

    def _built(self) -> nn.Module:
        """The architecture; of a model of transformers without numbers, which would take as much memory as the recorded ones."""
        if self.recipe.model.factory is None:
            from accelerate import init_empty_weights

            with init_empty_weights(include_buffers=False):
                model = self.new_model()
            model.tie_weights()  # type: ignore[operator]
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            if names == [entry.name for entry in self.trajectory.layout.parameters]:
                return model
        return self.new_model()

    @cached_property
    def evidence(self) -> Evidence:
        """What criteria may look at, a block at a time."""
        found = super().evidence
        return replace(found, spread=self._row(found), device=self._home.device)

    def asked(self, **options: Any) -> Evidence:
        found = super().asked(**options)
        return replace(found, spread=self._row(found))

    def _row(self, found: Evidence) -> Row:
        data = found.data if found.data is not None else Samples.held([])
        names = tuple(entry.name for entry in found.layout.parameters)
        return Row(self.model, names, data, self.task, self._home, found.memory, self.path, self._half)

    @cached_property
    def _home(self) -> Viewed:
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        held: list[tuple[Tensor, torch.device]] = []
        for module, place in places_of(self._map, self.model, 1).items():
            if place not in DEVICES:
                device = torch.device(place if isinstance(place, str) else f"cuda:{place}")
                inside = [tensor for name, tensor in named.items() if name == module or name.startswith(f"{module}.")]
                held += [(tensor, device) for tensor in inside]
        return Viewed(min((device for _, device in held), key=str, default=torch.device("cpu")), held)


def hold(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of a model's parameters and buffers of these names; what is tied stays so.

    Raises:
        ArtifactError: a parameter is not among them, or has another shape.
    """
    first: dict[int, str] = {}
    made: dict[str, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        known = first.setdefault(id(old), name)
        if known not in tensors or tensors[known].shape != old.shape:
            raise ArtifactError(f"the model is not the recorded one: {known} {tuple(old.shape)} is not in the recording")
        if known not in made:
            made[known] = nn.Parameter(tensors[known], requires_grad=old.requires_grad)
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._parameters[key] = made[known]
    for name, _ in list(model.named_buffers(remove_duplicate=False)):
        if name in tensors:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = tensors[name]
