"""What a layer's outputs are added to before anything else reads them: the residual stream of a transformer, mostly.

A layer that writes into a stream can make up for what earlier ones lack there, its own outputs aside: what is to be kept is the
sum. It is found by following tensors through one run, so that no architecture has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
ALIKE = {aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.clone.default,
         aten._to_copy.default}  # fmt: skip
"""Operations whose results are their first argument, in another shape, kind or place at most."""


class Sums(TorchDispatchMode):
    """Follows a layer's outputs to the sums they enter.

    An addition belongs to the sum if nothing but additions had read it until then, so that parallel branches do; and, later, if
    what it adds comes from a layer that is gone: what that did is made up for by who wrote before it.

    Attributes:
        found: by call of the layer, everything that was added to its outputs, ``None`` where they are read otherwise first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor | None] = []
        self._sum: Tensor | None = None
        """The outputs as they are now, with what was added."""
        self._read = False
        self._gone: list[Tensor] = []  # held, so that no other tensor comes to be known by their numbers

    def begin(self, output: Tensor) -> None:
        """The layer was called, and gave this."""
        self.found.append(None)
        self._sum, self._read = output, False

    def gone(self, output: Tensor) -> None:
        """A layer that is gone gave this."""
        self._gone.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._sum
        if before is None and not self._gone:
            return func(*args, **kwargs)
        added = self._added(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in ALIKE and self._is_gone(args[0]):
            self._gone.append(out)
        if before is None or not any(each is before for each in tree_leaves((args, kwargs))):
            return out
        if added is not None and out.shape == before.shape:
            now = self.found[-1]
            self.found[-1] = added if now is None else now + added
            self._sum, self._read = out, False
        elif self.found[-1] is not None:
            self._read = True
        elif func in ALIKE and _same_rows(out, before):
            self._sum = out
        else:
            self._sum = None
        return out

    def _added(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """What this operation adds to the sum, if it is such an addition."""
        if func not in ADDITIONS or kwargs.get("alpha", 1) != 1 or not all(isinstance(each, Tensor) for each in args[:2]):
            return None
        one, two = args[:2]
        if (one is self._sum) == (two is self._sum):
            return None
        other: Tensor = two if one is self._sum else one
        if self._read and not self._is_gone(other):
            return None
        assert self._sum is not None
        return other.expand(self._sum.shape).clone() if other.dim() <= self._sum.dim() else None

    def _is_gone(self, tensor: Any) -> bool:
        return any(tensor is each for each in self._gone)


def _same_rows(out: Tensor, before: Tensor) -> bool:
    return out.numel() == before.numel() and out.shape[-1:] == before.shape[-1:]


@contextmanager
def following(layers: Sequence[nn.Module], gone: Sequence[nn.Module]) -> Iterator[Sums]:
    """While inside, the sums that the outputs of ``layers`` enter are found; ``gone``: layers that compute nothing any more."""
    sums = Sums()

    def hook(see: Callable[[Tensor], None]) -> Callable[..., None]:
        return lambda module, inputs, output: see(output) if isinstance(output, Tensor) else None

    with ExitStack() as exits:
        for chosen, see in ((layers, sums.begin), (gone, sums.gone)):
            for layer in chosen:
                exits.callback(layer.register_forward_hook(hook(see)).remove)
        exits.enter_context(sums)
        yield sums
