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
        self._shape = torch.Size()
        self._sum: list[Tensor] = []
        """The outputs as they are now, with what was added, in all their shapes and kinds; empty where they are lost sight of."""
        self._read = False
        self._gone: list[Tensor] = []  # held, so that no other tensor comes to be known by their numbers

    def begin(self, output: Tensor) -> None:
        """The layer was called, and gave this."""
        self.found.append(None)
        self._sum, self._shape, self._read = [output], output.shape, False

    def gone(self, output: Tensor) -> None:
        """A layer that is gone gave this."""
        self._gone.append(output)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._sum and not self._gone:
            return func(*args, **kwargs)
        added = self._added(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in ALIKE:
            for known in (self._gone, self._sum):
                if _among(args[0], known):
                    known.append(out)
        elif added is not None and out.numel() == added.numel():
            now = self.found[-1]
            self.found[-1] = added if now is None else now + added
            self._sum, self._read = [out], False
        elif any(_among(each, self._sum) for each in tree_leaves((args, kwargs))):
            self._read = True
            if self.found[-1] is None:
                self._sum = []
        return out

    def _added(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
        """What this operation adds to the sum, in the outputs' shape, if it is such an addition."""
        if func not in ADDITIONS or kwargs.get("alpha", 1) != 1 or not all(isinstance(each, Tensor) for each in args[:2]):
            return None
        one, two = args[:2]
        first = _among(one, self._sum)
        if first == _among(two, self._sum):
            return None
        own, other = (one, two) if first else (two, one)
        if (self._read and not _among(other, self._gone)) or other.dim() > own.dim() or other.numel() > own.numel():
            return None
        found: Tensor = other.expand(own.shape).reshape(self._shape).clone()
        return found


def _among(tensor: Any, known: Sequence[Tensor]) -> bool:
    return any(tensor is each for each in known)


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
