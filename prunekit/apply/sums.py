"""What a layer's outputs are added to before anything else reads them: the residual stream of a transformer, mostly.

A layer that writes into a stream can make up for what earlier ones lack there, its own outputs aside: what is to be kept is the
sum. It is found by following tensors through one run, so that no architecture has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunekit.batch import answers

SUMS = 2
"""Which sums are kept, for reuse: what was compensated otherwise is computed anew."""

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
ALIKE = {aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.clone.default,
         aten._to_copy.default}  # fmt: skip
"""Operations whose results are their first argument, in another shape, kind or place at most."""


@dataclass
class _Stage:
    """A sum on its way: tensors that hold it, in all its shapes and kinds, and what was added until then."""

    tensors: list[Tensor]
    added: Tensor | None


class Sums(TorchDispatchMode):
    """Follows a layer's outputs to the sums they enter.

    An addition belongs to the sum if nothing but additions had read it until then, so that parallel branches do; and, later, if
    what it adds comes from layers that are gone: what these did is made up for by who wrote before them. What is read again, or
    returned, after something was added to it, was no part of a larger sum: additions from there on do not belong to it.

    Attributes:
        found: by call of the layer, everything that was added to its outputs, ``None`` where they are read otherwise first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor | None] = []
        self._shape = torch.Size()
        self._stages: list[_Stage] = []
        """Of the last call: its outputs, and the sums that they came to, the present one last; empty where there is none."""
        self._open = self._read = False
        self._gone: list[Tensor] = []  # held, so that no other tensor comes to be known by their numbers

    def begin(self, output: Any) -> None:
        """The layer was called, and gave this."""
        self.found.append(None)
        known = isinstance(output, Tensor)
        self._stages, self._open, self._read = [_Stage([output], None)] if known else [], known, False
        self._shape = output.shape if known else torch.Size()

    def gone(self, output: Any) -> None:
        """A layer that is gone gave this."""
        if isinstance(output, Tensor):
            self._gone.append(output)

    def end(self, answer: Any) -> None:
        """The run is over, and this is what it gave."""
        for tensor in answers(answer):
            self._reading(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._stages and not self._gone:
            return func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func in ALIKE:
            out = func(*args, **kwargs)
            for known in (self._gone, *(stage.tensors for stage in self._stages)):
                if _among(args[0], known):
                    known.append(out)
            return out
        pair = self._pair(func, args, kwargs)
        own = None if pair is None else self._own(*pair)
        for tensor in given:
            if own is None or tensor is not own[0]:
                self._reading(tensor)
        added = None if own is None or not self._open else own[1].expand(own[0].shape).reshape(self._shape).clone()
        out = func(*args, **kwargs)
        if pair is not None and all(_among(each, self._gone) for each in pair):
            self._gone.append(out)
        if added is not None and own is not None:
            before = self._stages[-1]
            now = _Stage([out], added if before.added is None else before.added + added)
            if out is own[0]:  # in place: what shares its memory is the new sum too
                now.tensors += [each for each in before.tensors if each is not out and _shares(each, out)]
                before.tensors = [each for each in before.tensors if not _shares(each, out)]
            self._stages.append(now)
            self.found[-1], self._read = now.added, False
        return out

    def _pair(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """What is added to what, if this is such an addition."""
        if func not in ADDITIONS or kwargs.get("alpha", 1) != 1 or not all(isinstance(each, Tensor) for each in args[:2]):
            return None
        return args[0], args[1]

    def _own(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor] | None:
        """The present sum and what is added to it, if that belongs to it."""
        present = self._stages[-1].tensors if self._open else []
        first = _among(one, present)
        if first == _among(two, present):
            return None
        own, other = (one, two) if first else (two, one)
        return None if (self._read and not _among(other, self._gone)) or not _spreads(other, own) else (own, other)

    def _reading(self, tensor: Tensor) -> None:
        """Something reads a tensor: the present sum may be read, an earlier one not."""
        for number, stage in enumerate(self._stages):
            if _among(tensor, stage.tensors):
                self._read = True
                if number < len(self._stages) - 1 or stage.added is None:
                    self.found[-1], self._open = stage.added, False
                    del self._stages[number + 1 :]
                return


def _spreads(tensor: Tensor, over: Tensor) -> bool:
    """Whether it has another's shape, or comes to it by standing for several."""
    shapes = zip(reversed(tensor.shape), reversed(over.shape), strict=False)
    return tensor.dim() <= over.dim() and all(mine in (1, theirs) for mine, theirs in shapes)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _among(tensor: Any, known: Sequence[Tensor]) -> bool:
    return any(tensor is each for each in known)


@contextmanager
def following(layers: Sequence[nn.Module], gone: Sequence[nn.Module]) -> Iterator[Sums]:
    """While inside, the sums that the outputs of ``layers`` enter are found; ``gone``: layers that compute nothing any more."""
    sums = Sums()

    def hook(see: Callable[[Any], None]) -> Callable[..., None]:
        return lambda module, inputs, output: see(output)

    with ExitStack() as exits:
        for chosen, see in ((layers, sums.begin), (gone, sums.gone)):
            for layer in chosen:
                exits.callback(layer.register_forward_hook(hook(see)).remove)
        exits.enter_context(sums)
        yield sums
