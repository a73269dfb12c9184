"""Runs a model once and follows, through every operation, which channel each of its numbers comes from."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from prunekit.batch import Inputs, answers, call, leaves
from prunekit.structure.groups import tied_names
from prunekit.structure.labels import Layers, Slots, along, given, support, tidy, united_along
from prunekit.structure.operations import LIKE, PARTS, flat, rule_of
from prunekit.structure.replacements import NarrowAttention
from prunekit.structure.roles import weight_roles

SILENT = ""
"""Reason of slots that stay and need no word: the model's outputs, and what another structure takes care of."""
COUNTED = {
    "BatchNorm1d": "num_features", "BatchNorm2d": "num_features", "BatchNorm3d": "num_features", "SyncBatchNorm": "num_features",
    "InstanceNorm1d": "num_features", "InstanceNorm2d": "num_features", "InstanceNorm3d": "num_features",
    "GroupNorm": "num_channels", "PReLU": "num_parameters",
}  # fmt: skip
"""Layers that say how many channels they are given, and in which attribute; a smaller one needs another number there."""


class TookTooLong(Exception):
    """The deadline passed while the model was read."""


class Trace(TorchDispatchMode):
    """One run of a model under which slots are united.

    Args:
        model: float parameters and buffers get slots; it is not changed. Run it inside the trace with ``read``.
        skip: names of layers whose outputs are no channels (an attention's projections).
        deadline: ``time.monotonic()`` at which to give up; None for never.

    Attributes:
        slots: what was found. Keys are ``<tensor>@<axis>``, and ``<module>:<attribute>`` for what layers count.
        splits: labels of axes that became several, whose units may have to leave from all of the first at once.
        order: parameter or buffer -> when it was first used.
    """

    def __init__(self, model: nn.Module, skip: Collection[str] = (), deadline: float | None = None) -> None:
        super().__init__()
        self.model, self.deadline = model, deadline
        self.slots, self.operation = Slots(), ""
        self.splits: list[Tensor] = []
        self.order: dict[str, int] = {}
        self._labels: Any = WeakTensorKeyDictionary()
        self.sliced: Any = WeakTensorKeyDictionary()
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._counts: dict[str, Tensor] = {}
        self._label_tensors(skip)

    def _label_tensors(self, skip: Collection[str]) -> None:
        roles, tied = weight_roles(self.model), tied_names(self.model)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            self._names[id(tensor)] = name
            owner = self.model.get_submodule(name.rpartition(".")[0])
            axes: Collection[int] = range(tensor.dim())
            if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and tensor is owner.weight:
                axes = (1,)  # tokens are no channels
            elif name in roles:
                axes = (roles[name].output, roles[name].input)
            layers: Layers = []
            for axis in axes:
                if tensor.shape[axis] > 1:
                    slots = self.slots.axis(f"{name}@{axis}", tensor.shape[axis])
                    layers.append(along(slots, axis, tuple(tensor.shape)))
                    if name in tied:
                        self.slots.hold(slots, f"{name} is tied to {tied[name]}; surgery would untie them")
                    elif name in roles and axis == roles[name].output and name.rpartition(".")[0] in skip:
                        self.slots.hold(slots, SILENT)
            self._labels[tensor] = layers
        for name, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention | NarrowAttention):
                for short, parameter in module.named_parameters():
                    for layer in self.of(parameter):
                        inner = not short.startswith("out_proj") and 0 in support(layer)  # heads, which go by themselves
                        self.slots.hold(layer, SILENT if inner else f"{name} is a MultiheadAttention, whose width stays")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never run inside torch.compile, so not guarded against it: the guard imports the whole compiler, more than a second."""
        return False

    @torch.no_grad()
    def read(self, inputs: Inputs) -> None:
        """Runs the model.

        Raises:
            TookTooLong: the deadline passed.
        """
        for tensor in leaves(inputs):
            if tensor.is_floating_point():
                self._labels[tensor] = given(tensor.shape)
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with self._watching(), self:
                answer = call(self.model, inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        for tensor in answers(answer):
            for layer in self.of(tensor):
                self.slots.hold(layer, SILENT)

    def of(self, tensor: Any) -> Layers:
        """The layers of a tensor; none for what is no tensor or a constant."""
        found: Layers = self._labels.get(tensor, []) if isinstance(tensor, Tensor) else []
        return found

    def put(self, tensor: Tensor, layers: Layers) -> None:
        """Gives a tensor its layers."""
        self._labels[tensor] = layers

    def where(self) -> str:
        """The module that is running."""
        return next((name for name in reversed(self._stack) if name), "the model")

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TookTooLong
        result = func(*args, **options)
        self.operation = func._schema.name.removeprefix("aten::")
        read = self.operation.removesuffix("_") if self.operation not in ("copy_", "_") else self.operation
        if read == "slice":
            self.sliced[result] = args[0]
        tensors = [a for a in flat([args, options]) if isinstance(a, Tensor)]
        for tensor in tensors:
            if (name := self._names.get(id(tensor))) is not None:
                self.order.setdefault(name, len(self.order))
        if not any(self.of(tensor) for tensor in tensors):
            return result
        outputs = [t for t in flat([result]) if isinstance(t, Tensor)]
        if read in PARTS:
            for out, layers in zip(outputs, PARTS[read](self, args, options, outputs), strict=True):
                self._labels[out] = tidy(layers)
            return result
        if read in LIKE or not outputs:
            return result
        rule = rule_of(read, torch.Tag.pointwise in func.tags)
        if rule is None:
            for tensor in tensors:
                for layer in self.of(tensor):
                    self.slots.hold(layer, f"{self.where()} does something with its channels that is not read ({read})")
            for out in outputs:
                self._labels[out] = given(out.shape)
            return result
        layers = tidy(rule(self, args, options, outputs[0]))
        for out in outputs:
            if out.is_floating_point() and out.shape == outputs[0].shape:
                self._labels[out] = layers
        return result

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While inside, it is known which module runs, and layers that count their channels are counted."""
        hooks = []
        for name, module in self.model.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self._stack.append(name)
                self._count(name, module, args)

            def leave(module: nn.Module, args: Any, out: Any) -> None:
                self._stack.pop()

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, name: str, module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            self._count_recurrent(name, module)
        attribute = next((COUNTED[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in COUNTED), None)
        groups = getattr(module, "groups", 1) if isinstance(getattr(module, "in_channels", None), int) else 1
        depthwise = groups > 1 and groups == getattr(module, "in_channels", 0)
        if not (attribute or depthwise) or not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return
        for layer in self.of(args[0]):
            if 1 not in support(layer):
                continue
            others = [axis for axis in range(layer.dim()) if axis != 1]
            channels = united_along(self.slots, layer, others, f"{name} mixes places").flatten()
            if depthwise:
                self.slots.unite(channels, self._counted(f"{name}:groups", groups), name)
            elif attribute and getattr(module, attribute) == len(channels):
                self.slots.unite(channels, self._counted(f"{name}:{attribute}", len(channels)), name)
                if isinstance(module, nn.GroupNorm):
                    numbers = self._counted(f"{name}:num_groups", module.num_groups)
                    self.slots.unite(channels.view(module.num_groups, -1), numbers[:, None], name)

    def _count_recurrent(self, name: str, module: nn.RNNBase | nn.RNNCellBase) -> None:
        """All layers and directions have as many hidden units."""
        prefix = f"{name}." if name else ""
        hidden = self._counted(f"{name}:hidden_size", module.hidden_size)
        for short, parameter in module.named_parameters():
            layers = self.of(parameter)
            if getattr(module, "proj_size", 0):
                for layer in layers:
                    self.slots.hold(layer, f"{prefix}{short}: a recurrent layer with proj_size is left whole")
            elif short.startswith("weight_hh"):
                gates = parameter.shape[0] // module.hidden_size
                self.slots.unite(layers[0][:, 0].view(gates, -1) if len(layers) == 2 else hidden, hidden, name)
                self.slots.unite(layers[-1][0] if len(layers) == 2 else hidden, hidden, name)
            elif short in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse") and module.input_size > 1:
                self.slots.unite(layers[-1][0], self._counted(f"{name}:input_size", module.input_size), name)

    def _counted(self, key: str, size: int) -> Tensor:
        """Slots of what a layer counts; the same ones every time it is called."""
        if key not in self._counts:
            self._counts[key] = self.slots.axis(key, size)
        return self._counts[key]
