"""Two models of one architecture passed side by side, part by part: what a layer gets in the one, and in the other.

Blocks run on inputs that are held, each model's own, so that both models run through once; layers outside of them, and models
without blocks, take a pass through the whole of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.batch import Inputs
from prunekit.blocks.homes import InMemory
from prunekit.blocks.passing import Part, Passing, in_order
from prunekit.blocks.stacks import Stack
from prunekit.criteria.layer_inputs import Layer, twins_among
from prunekit.data import Samples


@dataclass(frozen=True)
class Pair:
    """Layers that get the same inputs, within each of the two models.

    Attributes:
        names: of their parameters.
        one, other: the layers of the first name, in each model.
        batches: each passes some samples through them, in the one and in the other model, when it is called.
    """

    names: list[str]
    one: Sequence[Layer]
    other: Sequence[Layer]
    batches: Sequence[tuple[Callable[[], Any], Callable[[], Any]]]


class Abreast:
    """A model and another one of its architecture, on the same samples.

    Args:
        models: both, in evaluation mode, on one device; computed with as they are when a layer's turn comes.
        layers: of each, by parameter.
        samples: of several ranks this one's.
        one: the inputs of one sample, by which models are looked at; the same on all ranks.
        most: bytes of activations to hold in memory, in all.
        spill: a folder for what is beyond them.
        gone: parameters of which the other model has nothing left, see ``Passing``.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        layers: tuple[Mapping[str, Sequence[Layer]], Mapping[str, Sequence[Layer]]],
        samples: Samples,
        one: Inputs,
        most: int,
        spill: Path,
        gone: Collection[str] = (),
    ) -> None:
        self._layers = layers
        self._passings = [
            Passing(model, held, samples, one, InMemory(model), most // 2, spill, gone)
            for model, held in zip(models, layers, strict=True)
        ]
        stacks = [passing.stacks for passing in self._passings]
        apart = any(_crosses(mine, held) for mine, held in zip(stacks, layers, strict=True))
        self._by_blocks = bool(stacks[0]) and not apart and [s.name for s in stacks[0]] == [s.name for s in stacks[1]]

    def pairs(self) -> Iterator[Pair]:
        """Layers in the order in which they are reached; the other model is changed before the next are asked for."""
        inside: Collection[str] = self._passings[0].layers if self._by_blocks else ()
        outside = [name for name in self._layers[0] if name not in inside]
        order = in_order(self._layers[0], self._passings[0].whole()) if outside else []
        first = next((number for number, name in enumerate(order) if name in inside), len(order))
        yield from self._whole([name for name in order[:first] if name in outside])
        if inside:
            for mine, theirs in zip(*(passing.parts() for passing in self._passings), strict=True):
                yield from self._part(mine, theirs)
        yield from self._whole([name for name in order[first:] if name in outside])

    def _whole(self, names: Sequence[str]) -> Iterator[Pair]:
        both = zip(self._layers, self._passings, strict=True)
        mine, theirs = (Part({name: layers[name] for name in names}, passing.whole()) for layers, passing in both)
        if names:
            yield from _grouped(mine, theirs, names)

    def _part(self, mine: Part, theirs: Part) -> Iterator[Pair]:
        yield from _grouped(mine, theirs, in_order(mine.layers, mine.batches))


def _grouped(mine: Part, theirs: Part, order: Sequence[str]) -> Iterator[Pair]:
    """A part's layers in order, those with the same inputs together."""
    found, others = (twins_among(part.layers, part.batches[0]) for part in (mine, theirs))
    twins = {name: twin for name, twin in found.items() if others.get(name) == twin}
    batches = list(zip(mine.batches, theirs.batches, strict=True))
    for name in order:
        if name not in twins:
            names = [name, *(other for other in order if twins.get(other) == name)]
            yield Pair(names, mine.layers[name], theirs.layers[name], batches)


def _crosses(stacks: Sequence[Stack], layers: Mapping[str, Sequence[Layer]]) -> bool:
    """Whether a parameter is the weight of layers of several blocks, or of one and of what is around it."""
    block_of = {
        id(module): number
        for number, block in enumerate(block for stack in stacks for block in stack.blocks)
        for module in block.modules()
    }
    return any(len({block_of.get(id(layer)) for layer in holding}) > 1 for holding in layers.values())
