"""A model that runs with factors on its weights, beside its dense weights, and hands gradients over tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunekit.batch import Inputs, Labels
from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction
from prunekit.kernel.function import plain_kernels

Use = Callable[[str, Tensor | None], None]
"""``(tensor's name, gradient)``; None where nothing of the loss reached it."""


class Live:
    """A model's private copy, its tensors scaled in place: no second graph, and no gradient of more than one tensor at a time.

    Args:
        function: whose private copy of the model is run. It must not be run by others between ``scale`` and ``backward``.
        dense: every coordinate's dense value by name, on the function's device; left as they are.
        scaled: names of the tensors that factors are put on.
        autocast: compute in bfloat16 where torch's autocast does; its target is computed in full.
        checkpointing: keep no activations inside the blocks of the model's longest ``nn.ModuleList``, run them again instead.

    Raises:
        UsageError: checkpointing is asked for, and the model has no such list.
    """

    def __init__(
        self,
        function: ModelFunction,
        dense: Mapping[str, Tensor],
        scaled: Sequence[str],
        autocast: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.function, self.dense, self.scaled = function, dense, list(scaled)
        self._autocast = autocast
        self._blocks = blocks_of(function.model) if checkpointing else None
        model = function.model
        config: Any = getattr(model, "config", None)
        if checkpointing and hasattr(config, "use_cache"):
            config.use_cache = False  # blocks that are run again would write into the cache twice
        places: dict[str, tuple[nn.Module, str]] = {}
        for owner, module in model.named_modules():
            for short in (*module._parameters, *module._buffers):
                places[f"{owner}.{short}" if owner else short] = (module, short)
        self._places = {name: places[name] for name in dense}

    def _tensor(self, name: str) -> Tensor:
        module, short = self._places[name]
        found = module._parameters[short] if short in module._parameters else module._buffers[short]
        assert found is not None
        return found

    @torch.no_grad()
    def scale(self, factor: Callable[[str], Tensor]) -> None:
        """Sets every tensor to its dense value, times ``factor(name)`` where it is scaled."""
        scaled = set(self.scaled)
        for name, value in self.dense.items():
            tensor = self._tensor(name).data
            if name in scaled:
                torch.mul(value, factor(name), out=tensor)
            else:
                tensor.copy_(value)

    @torch.no_grad()
    def values(self, x: Inputs, y: Labels) -> Tensor:
        """Target values ``(samples, targets)`` of the model as it is scaled."""
        with self.running():
            return self.function.here(x, y)

    def backward(self, batches: Sequence[tuple[Inputs, Labels]], samples: int, use: Use) -> float:
        """The mean of the target over ``samples``; ``use`` gets every scaled tensor's gradient of it, once.

        A tensor's gradient is given as soon as the backward pass of the last batch has it, and is freed when ``use`` returns.
        """
        total, left = 0.0, len(batches)
        waiting = set(self.scaled)

        def taken(name: str, leaf: Tensor) -> None:
            if left == 1:
                waiting.discard(name)
                gradient, leaf.grad = leaf.grad, None
                use(name, gradient)

        with self._leaves(taken):
            for x, y in batches:
                with self.running(), self._run_again():
                    values = self.function.here(x, y)
                    mean = values.sum() / samples
                if mean.requires_grad:
                    mean.backward()
                total += float(mean.detach())
                left -= 1
            with torch.no_grad():
                for name in [each for each in self.scaled if each in waiting]:  # what the last batch did not reach
                    use(name, self._tensor(name).grad)
        return total

    @contextmanager
    def _leaves(self, taken: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While inside, the scaled tensors require gradients, and report them."""
        hooks, swapped = [], []
        for name in self.scaled:
            module, short = self._places[name]
            leaf = self._tensor(name)
            if short in module._buffers:  # a buffer that takes part, such as a mean that goes with its channel
                swapped.append((module, short, leaf))
                module._buffers[short] = leaf = leaf.detach().clone()
            leaf.requires_grad_(True)
            hooks.append(leaf.register_post_accumulate_grad_hook(partial(taken, name)))
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in self.scaled:
                leaf = self._tensor(name)
                leaf.grad = None
                leaf.requires_grad_(False)
            for module, short, buffer in swapped:
                module._buffers[short] = buffer

    @contextmanager
    def running(self, autocast: bool | None = None) -> Iterator[None]:
        """While inside, models compute in this precision (None: this one's own), by fused kernels where there are any."""
        kind, low = self.function.device.type, self._autocast if autocast is None else autocast
        with plain_kernels(attention=False), torch.autocast(kind, torch.bfloat16) if low else nullcontext():
            yield

    @contextmanager
    def _run_again(self) -> Iterator[None]:
        """While inside, blocks keep no activations."""
        blocks = self._blocks or ()
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The items of the longest list of modules.

    Raises:
        UsageError: there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UsageError("the model has no nn.ModuleList, whose items would be its blocks")
    return max((list(one) for one in lists), key=len)
