"""Parts of a model in the order in which they run, each with the inputs that the pruned parts before it send.

A part is a block of a stack (``prunekit.layerwise.blocks``): its inputs are held, so that the model runs through once, one block
at a time. Where a model has no stack a part is one layer, and its inputs are what the whole model sends there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import call, mapped, to
from prunekit.criteria.layer_inputs import Layer, reaching
from prunekit.data import Samples
from prunekit.errors import UsageError
from prunekit.layerwise.blocks import Call, Stack, first_tensor, hidden_of, moved, passed_over, stacks_of, with_hidden
from prunekit.measure.macs import unfused

ROWS = 2**13
"""Rows of hidden states that run through a block at a time, or one sample's."""


@dataclass(frozen=True)
class Part:
    """Layers that are pruned together.

    Attributes:
        layers: by parameter, in model order.
        batches: each passes some samples through them when it is called.
    """

    layers: Mapping[str, Sequence[Layer]]
    batches: Sequence[Callable[[], Any]]


class Passing:
    """How samples get through a model, part by part.

    Args:
        model: computed with as it is when a part's turn comes; what becomes of one part is what the next one sees.
        layers: that are pruned, by parameter.
        samples: calibration samples.
        device: where parts compute.
        most: bytes of activations to hold.

    Attributes:
        layers: those of stacks, or all where there is no stack.
        stacks: in the order in which they run.
        no_stacks: module lists that are none, and why.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Sequence[Layer]], samples: Samples, device: torch.device, most: int
    ) -> None:
        self._model, self._samples, self._device, self._most = model, samples, device, most
        self._home = next(model.parameters()).device
        with without_cache(model), unfused():
            one = to(samples.rows(0, 1)[0], self._home)
            self.stacks, self.no_stacks = stacks_of(model, layers, one, device)
        inside = tuple(f"{stack.name}." for stack in self.stacks)
        self.layers = {name: held for name, held in layers.items() if name.startswith(inside)} if inside else dict(layers)

    def parts(self) -> Iterator[Part]:
        """Every part in turn; it is changed before the next one is asked for.

        Raises:
            UsageError: activations take more memory than they may.
        """
        with without_cache(self._model), unfused():
            if not self.stacks:
                with moved(self._model, self._device):
                    yield from self._layers()
            for stack in self.stacks:
                yield from self._blocks(stack)

    def _layers(self) -> Iterator[Part]:
        batches = [partial(self._whole, number) for number in range(len(self._samples.groups))]
        order: dict[str, None] = {}
        with reaching(self.layers, lambda name, layer, x: order.setdefault(name)):
            for run in batches:
                run()
        for name in (*order, *(name for name in self.layers if name not in order)):
            yield Part({name: self.layers[name]}, batches)

    def _whole(self, number: int) -> None:
        call(self._model, to(self._samples.batch(number)[0], self._device))

    def _blocks(self, stack: Stack) -> Iterator[Part]:
        held = self._caught(stack)
        for number, block in enumerate(stack.blocks):
            prefix = f"{stack.name}.{number}."
            layers = {name: holding for name, holding in self.layers.items() if name.startswith(prefix)}
            batches = [partial(held.run, block, number, batch) for batch in range(len(held.hidden))]
            with moved(block, self._device):
                if layers:
                    yield Part(layers, batches)
                if number + 1 < len(stack.blocks):
                    for batch, run in enumerate(batches):
                        held.hidden[batch] = run()

    def _caught(self, stack: Stack) -> _Held:
        """The inputs of a stack's first block, and what else its blocks are called with."""
        held = _Held(self._device)
        first = hidden_of(passed_over(self._model, stack, self.stacks, self._one(), self._device)[0])
        assert first is not None
        for inputs, _ in self._samples.bounded(max(1, ROWS * first.shape[-1] // first.numel())):
            held.add(passed_over(self._model, stack, self.stacks, to(inputs, self._home), self._device))
            if held.bytes > self._most:
                seen = sum(len(hidden) for hidden in held.hidden)
                raise UsageError(
                    f"activations: the inputs of {stack.name} take about {_amount(held.bytes * len(self._samples) / seen)} for "
                    f"{len(self._samples)} samples, and {_amount(self._most)} may be held; take fewer samples, or allow more"
                )
        return held

    def _one(self) -> Any:
        return to(self._samples.rows(0, 1)[0], self._home)


@dataclass
class _Held:
    """The inputs of the block whose turn it is, and what else blocks are called with, for all samples, on ``device``.

    Attributes:
        hidden: by batch.
        calls: by batch and block, the hidden states left out.
        bytes: of tensors that are held.
    """

    device: torch.device
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    bytes: int = 0
    shared: list[Tensor] = field(default_factory=list)

    def add(self, calls: Sequence[Call]) -> None:
        """One batch's; a tensor that blocks share, or an equal one of the batch before, is held once."""
        hidden = hidden_of(calls[0])
        assert hidden is not None
        moved_ones: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved_ones:
                here, known_ones = tensor.to(self.device), (*moved_ones.values(), *self.shared)
                alike = (old for old in known_ones if old.shape == here.shape and old.dtype == here.dtype)
                known = next((old for old in alike if torch.equal(old, here)), None)
                self.bytes += 0 if known is not None else here.nbytes
                moved_ones[id(tensor)] = here if known is None else known
            return moved_ones[id(tensor)]

        rest = [mapped(with_hidden(each, hidden[:0]), keep) for each in calls]
        self.shared = list(moved_ones.values())
        self.calls.append(rest)
        self.hidden.append(hidden.to(self.device))
        self.bytes += self.hidden[-1].nbytes

    def run(self, block: nn.Module, number: int, batch: int) -> Tensor:
        """The block on a batch; its hidden states."""
        args, kwargs = with_hidden(self.calls[batch][number], self.hidden[batch])
        found = first_tensor(block(*args, **kwargs))
        assert found is not None
        return found


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """transformers' models keep no keys and values inside: a block that runs twice would add to them."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    keeping = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in keeping:
        config.use_cache = False
    try:
        yield
    finally:
        for config in keeping:
            config.use_cache = True


def _amount(size: float) -> str:
    unit, name = next(found for found in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")) if size >= found[0])
    return f"{size / unit:.4g} {name}"
