"""Parts of a model in the order in which they run, each with the inputs that the pruned parts before it send.

A part is a block of a stack (``prunekit.blocks.stacks``): its inputs are held, so that the model runs through once, one block
at a time. Where a model has no stack a part is one layer, and its inputs are what the whole model sends there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import ranks
from prunekit.batch import Inputs, call, fresh, to
from prunekit.blocks.held import Held, Hidden, at_once
from prunekit.blocks.homes import Home
from prunekit.blocks.stacks import Stack, hidden_of, passed_over, stacks_of
from prunekit.criteria.layer_inputs import Layer, reaching
from prunekit.data import Samples
from prunekit.errors import UsageError
from prunekit.measure.macs import unfused


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
        samples: calibration samples; of several ranks this one's.
        one: the inputs of one sample, by which the model is looked at; the same on all ranks.
        home: where the model's weights lie, and where parts compute.
        most: bytes of activations to hold in memory.
        spill: a folder for what is beyond them; None refuses it.
        gone: parameters of which nothing is left. A block that has no other layer is not a part: the samples that pass through
            the one before it go on through it.

    Attributes:
        layers: those of stacks, or all where there is no stack.
        stacks: in the order in which they run.
        no_stacks: module lists that are none, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Sequence[Layer]],
        samples: Samples,
        one: Inputs,
        home: Home,
        most: int,
        spill: Path | None = None,
        gone: Collection[str] = (),
    ) -> None:
        self._model, self._samples, self._home, self._most, self._spill = model, samples, home, most, spill
        self._gone = gone
        self._one = to(one, home.inputs)
        with without_cache(model), unfused():
            self.stacks, self.no_stacks = stacks_of(model, layers, self._one, home)
        inside = tuple(f"{stack.name}." for stack in self.stacks)
        self.layers = {name: held for name, held in layers.items() if name.startswith(inside)} if inside else dict(layers)

    def parts(self) -> Iterator[Part]:
        """Every part in turn; it is changed before the next one is asked for.

        Raises:
            UsageError: activations take more memory than they may.
        """
        with without_cache(self._model), unfused():
            if not self.stacks:
                with self._home.present(self._model):
                    yield from self._layers()
            for stack in self.stacks:
                yield from self._blocks(stack)

    def _layers(self) -> Iterator[Part]:
        batches = self.whole()
        for name in dict.fromkeys((*in_order(self.layers, batches), *self.layers)):
            yield Part({name: self.layers[name]}, batches)

    def whole(self) -> list[Callable[[], Any]]:
        """Each passes some samples through all of the model when it is called; its weights are to be where it computes."""
        return [partial(self._run, number) for number in range(len(self._samples.groups))]

    def _run(self, number: int) -> Any:
        return call(self._model, fresh(to(self._samples.batch(number)[0], self._home.device)))

    def _blocks(self, stack: Stack) -> Iterator[Part]:
        held = self._caught(stack)
        last = 0
        while last < len(stack.blocks):
            number, last = last, last + 1
            prefix = f"{stack.name}.{number}."
            layers = {name: holding for name, holding in self.layers.items() if name.startswith(prefix)}
            while last < len(stack.blocks) and self._is_gone(f"{stack.name}.{last}."):
                last += 1
            blocks = range(number, last)
            batches = [partial(held.run, stack.blocks, blocks, batch) for batch in range(len(held.hidden))]
            with ExitStack() as present:
                for block in blocks:
                    present.enter_context(self._home.present(stack.blocks[block]))
                if layers:
                    yield Part(layers, batches)
                    self._home.settle(stack.blocks[number])
                if last < len(stack.blocks):
                    for batch, run in enumerate(batches):
                        held.hidden[batch] = run()

    def _is_gone(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._gone) and not any(name.startswith(prefix) for name in self.layers)

    def _caught(self, stack: Stack) -> Held:
        """The inputs of a stack's first block, and what else its blocks are called with."""
        held = Held(self._home.device, Hidden(self._home.device, self._most, self._spill))
        first = hidden_of(passed_over(self._model, stack, self.stacks, self._one, self._home)[0])
        assert first is not None
        for inputs, _ in self._samples.bounded(at_once(first)):
            held.add(passed_over(self._model, stack, self.stacks, to(inputs, self._home.inputs), self._home))
            if self._spill is None and held.bytes > self._most:
                seen = sum(len(held.hidden[batch]) for batch in range(len(held.hidden)))
                raise UsageError(
                    f"activations: the inputs of {stack.name} take about {_amount(held.bytes * len(self._samples) / seen)} for "
                    f"{len(self._samples)} samples, and {_amount(self._most)} may be held; take fewer samples, or allow more"
                )
        return held


def in_order(layers: Mapping[str, Sequence[Layer]], batches: Sequence[Callable[[], Any]]) -> list[str]:
    """Layers in the order in which the batches of all ranks reach them; what none reaches is left out."""
    orders: list[list[str]] = []
    for run in batches:
        seen: list[str] = []
        with reaching(layers, lambda name, *_, see=seen.append: see(name)):
            run()
        orders.append(list(dict.fromkeys(seen)))
    return merged(ranks.gathered(merged(orders)))


def merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """Everything in one order, in which what some batch reaches later comes later: samples may go different ways.

    Example:
        >>> from prunekit.blocks.passing import merged
        >>> merged([["left", "end"], ["right", "end"]])
        ['left', 'right', 'end']
    """
    found: list[str] = []
    for order in orders:
        before = len(found)
        for name in reversed(order):
            if name in found:
                before = min(before, found.index(name))
            else:
                found.insert(before, name)
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
