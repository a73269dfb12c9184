"""What a training loop noted for the coming step: samples, random states, clipping; and what of it belongs to no step.

A GradScaler does not call the optimizer when it finds Inf, so a skipped step is seen only by what follows: gradients that
had been accumulated are gone, and no step has taken them. The notes that belong to them go with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.errors import Note, UsageError
from prunekit.trajectory.shards import is_spread

WITHOUT = (
    "Recorder: it was not noted which samples this step sees; explanations by training samples (data-wise scores) and replaying "
    "will not work, everything else will. Iterate over recorder.watch(loader), or call recorder.batch(indices) before each step"
)


class Notes:
    """Notes for the coming step.

    Args:
        parameters: those that are trained.
        called: the module that the loop calls.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], called: nn.Module) -> None:
        self.parameters, self._called = list(parameters), called
        self._spread = any(is_spread(p) for p in self.parameters)
        self._hooks: list[Any] = []
        self._shared: _Shared | None = None
        self.told = False
        """Whether it was said that samples are missing."""
        self.drop()

    def watch(self) -> None:
        """Looks at the gradients as they are accumulated, until ``close``.

        Under ``fully_shard`` they come to whole parameters, which nobody outside sees, and to the recorded ones only when they
        are averaged; that a backward pass has begun is seen by the model's outputs.
        """
        if self._spread:
            self._hooks.append(self._called.register_forward_hook(self._after_forward))
            self._hooks += [p.register_post_accumulate_grad_hook(self._after_average) for p in self.parameters]
            return
        for parameter in self.parameters:
            self._hooks.append(parameter.register_hook(self._before_gradient(parameter)))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._after_gradient))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def drop(self) -> None:
        """Forgets everything: the coming step begins anew."""
        self.line: dict[str, Any] = {}
        self.random: list[Tensor] = []
        self.accumulated = False
        """Whether a gradient has come since the last step."""
        self._come: set[nn.Parameter] = set()  # those that a gradient came to since the last step
        self._noted, self._drawn = 0, 0  # micro-batches and random states noted when the last gradient came
        self._averaged = False  # whether it came to the parameters that are spread over processes
        self._afterwards = False  # whether the loop notes a batch after its backward pass
        self._watched = 0  # micro-batches that a watched loader noted last; the loop's own words take their place

    def batch(self, indices: Sequence[int] | Tensor, seed: int | None, weight: float | None) -> None:
        """Adds a micro-batch; of one that a watched loader has noted, these words count."""
        self._cut(self._watched)
        self._let_go(all_of_it=True)
        self._add(indices, seed, weight)

    def watched(self, indices: Sequence[int]) -> None:
        """Adds the micro-batch that a watched loader gives out now; what it gave before and no gradient came of is forgotten:

        the loop has skipped it, or only looked at it.
        """
        if self._watched and len(self.line["batches"]) > self._noted:
            self._cut(len(self.line["batches"]) - self._noted)
            del self.random[self._drawn :]
        self._let_go(all_of_it=True)
        self._add(indices, None, None)
        self._watched = 1

    def _cut(self, last: int) -> None:
        """Forgets the last micro-batches."""
        self._watched = 0
        for key in ("batches", "seeds", "weights") if last > 0 else ():
            del self.line[key][-last:]

    def _add(self, indices: Sequence[int] | Tensor, seed: int | None, weight: float | None) -> None:
        found = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        if not all(isinstance(i, int) or hasattr(i, "__index__") for i in found):
            raise UsageError("recorder.batch takes the sample indices of the batch: whole numbers, one axis")
        if not self.line.get("batches"):
            self._afterwards = self.accumulated
        self.line.setdefault("batches", []).append([int(i) for i in found])
        self.line.setdefault("seeds", []).append(seed)
        self.line.setdefault("weights", []).append(weight)

    def of_step(self, optimizer: int, state: int) -> tuple[dict[str, Any], list[Tensor], int]:
        """Everything noted for the step that was just taken, and how many states back its gradient was; then begins anew.

        Optimizers that step one after another on one backward pass have its samples in common.

        Args:
            optimizer: number of the one that stepped.
            state: number of the state that it stepped from.
        """
        fresh, line, random = self.accumulated, self.line, self.random
        self.drop()
        shared = self._shared
        if shared is None or fresh or line.get("batches") or optimizer in shared.used:
            if not line.get("batches") and not self.told:
                warnings.warn(WITHOUT, Note, stacklevel=2)
                self.told = True
            self._shared = shared = _Shared(dict(line), random, state, {optimizer})
        else:
            shared.used.add(optimizer)
            line = {**shared.line, **line}
        for key in ("seeds", "weights"):
            if all(value is None for value in line.get(key, ())):
                line.pop(key, None)
        return line, shared.random, state - shared.state

    def _before_gradient(self, parameter: nn.Parameter) -> Any:
        def look(gradient: Tensor) -> None:
            if parameter in self._come and (parameter.grad is None or not bool(parameter.grad.any())):
                self._let_go(all_of_it=self._afterwards)

        return look

    def _after_gradient(self, parameter: nn.Parameter) -> None:
        self._come.add(parameter)
        self._came()

    def _after_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._backward)
                return

    def _backward(self, gradient: Tensor) -> None:
        self._let_go(all_of_it=self._afterwards)
        self._came()

    def _after_average(self, parameter: nn.Parameter) -> None:
        self._averaged = True
        self._came()

    def _came(self) -> None:
        self.accumulated = True
        self._noted, self._drawn = len(self.line.get("batches", ())), len(self.random)

    def _emptied(self) -> bool:
        if self._spread:  # zeros in the rows of this process do not tell
            return self._averaged and all(p.grad is None for p in self.parameters)
        return not any(p.grad is not None and bool(p.grad.any()) for p in self.parameters)

    @torch.no_grad()
    def _let_go(self, all_of_it: bool) -> None:
        """Drops the notes of gradients that came and were emptied without a step."""
        if not self.accumulated or not self._emptied():
            return
        for key in ("batches", "seeds", "weights"):
            if key in self.line:
                self.line[key] = [] if all_of_it else self.line[key][self._noted :]
                if not self.line[key]:
                    del self.line[key]
        self.line.pop("gradient_scale", None)
        self.random = self.random[self._drawn :]
        self.accumulated, self._averaged, self._noted, self._drawn, self._afterwards = False, False, 0, 0, False
        self._come.clear()


@dataclass
class _Shared:
    """Notes of the last backward pass, the number of the state it was taken at, and which optimizers have stepped on it."""

    line: dict[str, Any]
    random: list[Tensor]
    state: int
    used: set[int]
