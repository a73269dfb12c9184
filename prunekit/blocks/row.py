"""A model as a row of blocks, passed forwards and backwards with one block at a time where it computes.

What criteria look at in a model that is too large to be held as one vector of weights (``prunekit.criteria.evidence.Spread``).
Forwards, the inputs of every block are kept for all samples. Backwards, blocks come in the opposite order: each runs again on
its inputs, with a graph, is given the gradient of its outputs, and leaves that of its weights and of its inputs, which are the
outputs of the block before. That is reverse mode with recomputation: the numbers are autograd's. What lies outside of the blocks
(embeddings, the output layer) is one more part, which runs with the blocks stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Batch, Inputs, Labels, call, leaves, mapped, to
from prunekit.blocks.held import Held, Hidden, at_once
from prunekit.blocks.homes import Viewed
from prunekit.blocks.passing import without_cache
from prunekit.blocks.stacks import (
    Call,
    Enough,
    Stack,
    Watch,
    computing,
    first_tensor,
    hidden_of,
    lists_of,
    replaced,
    stacks_of,
)
from prunekit.data import Samples
from prunekit.data.sharing import same_alone
from prunekit.errors import PrunekitError, UsageError
from prunekit.kernel.function import plain_kernels
from prunekit.kernel.statistics import differentiable_statistics
from prunekit.measure.macs import unfused
from prunekit.progress import Bar
from prunekit.task import Task
from prunekit.task.evaluation import unfit
from prunekit.traceless import traceless
from prunekit.trajectory.derived import derived_weights
from prunekit.trajectory.layout import path_dtype

Total = Callable[[Tensor, Labels, int], Tensor]
"""Outputs and labels of a batch, and its number, to the one number whose gradient is wanted."""
OUTSIDE = -1
"""The stage of what lies outside of the blocks, which comes last."""


class Row:
    """One model and its scoring samples.

    Args:
        model: in evaluation mode; its parameters' numbers lie where ``home`` says.
        names: of the parameters that have gradients.
        samples: that ``run`` and ``answer`` are about.
        task: which of the model's answers counts.
        home: where weights lie, and where everything computes.
        most: bytes of hidden states and their gradients in memory.
        spill: a folder for what is beyond them.
        half: whether the model was in half precision before it was widened.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        samples: Samples,
        task: Task,
        home: Viewed,
        most: int,
        spill: Path,
        half: bool = False,
    ) -> None:
        self.model, self.device, self.half = model, home.device, half
        self._names, self._samples, self._task, self._home = names, samples, task, home
        self._most, self._spill, self._dtype = most, spill, path_dtype(model)

    def check(self) -> None:
        """Passes one sample through, and all of them as far as the first block; once.

        Raises:
            UsageError: the model is no one row of blocks, or more goes from one to the next than hidden states.
        """
        _ = self._first

    def cut(self, samples: Samples) -> Samples:
        """The same samples, in batches that leave room for a block; as they are where the model mixes them."""
        bounded = samples.bounded(self._at_once)
        return samples if len(bounded.groups) == len(samples.groups) or self._mixes else bounded

    def run(self) -> None:
        """Passes all samples through the model once, so that hooks see what goes into every module.

        They see each module's inputs once: what leads to the first block was caught before, by ``check``.
        """
        held, blocks = self._first, self._stack.blocks
        states = Hidden(self.device, self._most // 4, self._spill)
        with self._quiet(), torch.no_grad(), Bar("score: blocks", len(blocks)) as bar:
            for number, block in enumerate(blocks):
                with self._home.present(block):
                    for batch in range(len(held.hidden)):
                        found = held.of(block, number, batch, states[batch] if number else held.hidden[batch])
                        if number:
                            states[batch] = found
                        else:
                            states.add(found)
                bar.advance()
            for batch, (inputs, _) in enumerate(self._own):
                self._outer(self._inputs(inputs), states[batch])

    def answer(self, batch: Batch) -> Tensor:
        """The outputs of a batch, block after block."""
        with self._quiet(), torch.no_grad(), computing(self._stack, self._home), self._outside():
            return self._task.outputs(call(self.model, self._inputs(batch[0])))

    def backward(self, samples: Samples, total: Total) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Of every batch the gradient of its ``total``: blocks from the last on, batch by batch within, then what is outside.

        Yields:
            the block's number or ``OUTSIDE``, the batch's, and by parameter of that part its gradient.
        """
        blocks, count = self._stack.blocks, len(samples.groups)
        with self._quiet(), Bar("score: gradients of blocks", 2 * len(blocks) + 2) as bar:
            held = self._caught(samples, self._most // 2)
            states, slopes = held.hidden, Hidden(self.device, self._most // 4, self._spill)
            for number, block in enumerate(blocks):
                with torch.no_grad(), self._home.present(block):
                    for batch in range(count):
                        states.add(held.of(block, number, batch, states[number * count + batch]))
                bar.advance()
            after = len(blocks) * count
            for batch, (inputs, labels) in enumerate(samples):
                slopes.add(self._tail(inputs, labels, batch, states[after + batch], total))
            bar.advance()
            for number in reversed(range(len(blocks))):
                block, own = blocks[number], self._inside[number]
                with self._home.present(block), requiring(own):
                    for batch in range(count):
                        given = states[number * count + batch].detach().requires_grad_()
                        with torch.enable_grad(), traceless(block):
                            answer = held.of(block, number, batch, given)
                        slope, found = _gradient(answer, given, own, slopes[batch])
                        slopes[batch] = slope
                        yield number, batch, found
                bar.advance()
            if not self._around:
                return
            for batch, (inputs, labels) in enumerate(samples):
                yield OUTSIDE, batch, self._ends(inputs, labels, batch, states[after + batch], slopes[batch], total)
            bar.advance()

    def _tail(self, inputs: Inputs, labels: Labels, batch: int, last: Tensor, total: Total) -> Tensor:
        """Of a batch's total the gradient by what the last block gives."""
        last = last.detach().requires_grad_()
        with self._outside(), torch.enable_grad():  # until the gradient is there: graphs hold weights themselves
            value = self._total(self._outer(self._inputs(inputs), last)[1], labels, batch, total)
            return _gradient(value, last, {}, torch.ones_like(value))[0]

    def _ends(self, inputs: Inputs, labels: Labels, batch: int, last: Tensor, slope: Tensor, total: Total) -> dict[str, Tensor]:
        """Of a batch's total the gradients by what lies outside of the blocks: behind the last, and before the first one."""
        with self._outside(), requiring(self._around), torch.enable_grad():
            calls, answer = self._outer(self._inputs(inputs), last.detach().requires_grad_())
            ends, weights = [self._total(answer, labels, batch, total)], [torch.ones((), device=self.device, dtype=slope.dtype)]
            first = hidden_of(calls[0])
            if first is not None and first.requires_grad:
                ends, weights = [*ends, first], [*weights, slope]
            weights[0] = weights[0].to(ends[0].dtype)
            if not any(end.requires_grad for end in ends):
                return {name: torch.zeros_like(parameter) for name, parameter in self._around.items()}
            found = torch.autograd.grad(ends, list(self._around.values()), weights, allow_unused=True)
        pairs = zip(self._around.items(), found, strict=True)
        return {name: torch.zeros_like(parameter) if one is None else one for (name, parameter), one in pairs}

    def _total(self, answer: Any, labels: Labels, batch: int, total: Total) -> Tensor:
        outputs, labels = self._task.outputs(answer), to(labels, self.device)
        self._task.check(outputs, labels, "scoring samples")
        return total(outputs, labels, batch).reshape(())

    # -- what the model is ---------------------------------------------------------------------------------------

    @cached_property
    def _stack(self) -> Stack:
        """The one row of blocks, once one sample has gone through it in pieces as it goes through the whole."""
        kind = type(self.model).__name__
        if (computed := next(derived_weights(self.model), None)) is not None:
            raise UsageError(
                f"{computed.name} is computed from other parameters ({computed.how}), and --device-map brings in weights as they "
                "lie; leave --device-map out"
            )
        differentiable_statistics(self.model)
        inputs = self._inputs(self._samples.rows(0, 1)[0])
        beside = self._beside([block for each in lists_of(self.model, self._names) for block in each.blocks])
        with self._quiet(), torch.no_grad(), self._home.here(beside):
            try:
                found, faults = stacks_of(self.model, self._names, inputs, self._home)
            except PrunekitError:
                raise
            except Exception as error:  # the user's own model and data
                raise unfit(kind, inputs, error) from error
        if len(found) != 1:
            why = "; ".join(f"{name}: {fault}" for name, fault in faults.items()) or (
                "it has several" if found else "it has no list of blocks"
            )
            raise UsageError(
                f"{kind} is no one row of blocks that hand their outputs on ({why}), and --device-map scores by samples a block "
                "at a time; leave --device-map out"
            )
        self._check_row(found[0], inputs)
        return found[0]

    def _check_row(self, stack: Stack, inputs: Inputs) -> None:
        kind, watch = type(self.model).__name__, Watch()
        with self._quiet(), torch.no_grad(), computing(stack, self._home, watch), self._home.here(self._beside(stack.blocks)):
            whole = self._task.outputs(call(self.model, inputs))
        if not all(len(leaves(answer)) == 1 for answer in watch.answers):
            raise UsageError(f"{kind}: the blocks of {stack.name} give more than hidden states; leave --device-map out")
        self._answer = watch.answers[-1]
        last = first_tensor(self._answer)
        assert last is not None
        around = self._of(self._beside(stack.blocks))
        with self._quiet(), self._home.here(self._beside(stack.blocks)), requiring(around), torch.enable_grad():
            calls, answer = self._outer(inputs, last, stack)
            outputs = self._task.outputs(answer).detach()
        rest = [leaf for args, kwargs in calls for leaf in leaves((args[1:], kwargs) if args else list(kwargs.values())[1:])]
        if any(leaf.requires_grad for leaf in rest):
            raise UsageError(
                f"{kind}: the blocks of {stack.name} are called with more than hidden states that was computed from weights; "
                "leave --device-map out"
            )
        near = float(whole.abs().nan_to_num(0, 0, 0).max()) if whole.numel() else 0.0
        if not torch.allclose(outputs, whole, rtol=1e-4, atol=1e-5 * near):
            raise UsageError(
                f"{kind}: what comes behind the blocks of {stack.name} looks at more than the last one's outputs; leave "
                "--device-map out"
            )
        owners: dict[int, set[str]] = {}
        for number, block in enumerate(stack.blocks):
            for parameter in block.parameters():
                owners.setdefault(id(parameter), set()).add(str(number))
        for parameter in around.values():
            owners.setdefault(id(parameter), set()).add("")
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        if (shared := next((key for key, places in owners.items() if len(places) > 1), None)) is not None:
            raise UsageError(
                f"{names[shared]} is shared by several blocks, or by one and what is around it; leave --device-map out"
            )

    @cached_property
    def _inside(self) -> list[dict[str, nn.Parameter]]:
        """By block its parameters with gradients."""
        return [self._of(block.parameters()) for block in self._stack.blocks]

    @cached_property
    def _around(self) -> dict[str, nn.Parameter]:
        """The parameters with gradients that lie outside of the blocks."""
        return self._of(self._beside(self._stack.blocks))

    def _of(self, tensors: Any) -> dict[str, nn.Parameter]:
        wanted = {id(tensor) for tensor in tensors}
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self._names if id(named[name]) in wanted}

    def _beside(self, blocks: Sequence[nn.Module]) -> list[Tensor]:
        """Parameters and buffers that lie in none of these."""
        inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
        return [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if id(tensor) not in inside]

    # -- passes --------------------------------------------------------------------------------------------------

    @cached_property
    def _at_once(self) -> int:
        """How many samples run through a block at a time."""
        first = hidden_of(self._outer(self._inputs(self._samples.rows(0, 1)[0]))[0][0])
        assert first is not None
        return at_once(first)

    @cached_property
    def _mixes(self) -> bool:
        """Whether a sample gets another answer among others than alone."""
        batch = self._samples.rows(0, min(2, len(self._samples)))
        return not same_alone(lambda some: self.answer(some).flatten(1), batch, self.answer(batch).flatten(1)[0])

    @cached_property
    def _own(self) -> Samples:
        return self.cut(self._samples)

    @cached_property
    def _first(self) -> Held:
        return self._caught(self._own, self._most // 4)

    def _caught(self, samples: Samples, most: int) -> Held:
        """What goes into the first block, and what else blocks are called with."""
        held = Held(self.device, Hidden(self.device, most, self._spill))
        for inputs, _ in samples:
            with torch.no_grad():
                held.add(self._outer(self._inputs(inputs))[0])
        return held

    def _outer(self, inputs: Inputs, last: Tensor | None = None, stack: Stack | None = None) -> tuple[list[Call], Any]:
        """What blocks are called with, and the model's answer, if the last block gave ``last``; without it the pass ends there.

        No block runs. Others than the last give NaN, so that an answer which depends on them shows it.
        """
        calls: list[Call] = []
        blocks = (self._stack if stack is None else stack).blocks

        def instead(number: int, forward: Any, block: nn.Module) -> Callable[..., Any]:
            def stand_in(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                given = hidden_of(calls[-1])
                assert given is not None
                if number == len(blocks) - 1 and last is None:
                    raise Enough
                hidden = last if number == len(blocks) - 1 else torch.full_like(given.detach(), torch.nan)
                return mapped(self._answer, lambda tensor: hidden)

            return stand_in

        answer = None
        outside = self._home.here(self._beside(blocks))
        with self._quiet(), replaced(blocks, instead), unhooked(blocks), outside, traceless(self.model), suppress(Enough):
            answer = call(self.model, inputs)
        return calls, answer

    def _inputs(self, inputs: Inputs) -> Inputs:
        """On the device, a copy; what is in half precision meets a model that is not."""

        def placed(tensor: Tensor) -> Tensor:
            narrow = tensor.is_floating_point() and tensor.element_size() < 4
            return tensor.to(self.device, self._dtype if narrow else tensor.dtype, copy=True)

        return mapped(inputs, placed)

    def _outside(self) -> AbstractContextManager[None]:
        return self._home.here(self._beside(self._stack.blocks))

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with without_cache(self.model), unfused(), plain_kernels():
            yield


def _gradient(
    value: Tensor, given: Tensor, parameters: Mapping[str, nn.Parameter], slope: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """By what was given, and by parameters; 0 where nothing depends on them."""
    wanted = [given, *parameters.values()]
    found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if value.requires_grad:
        found = torch.autograd.grad(value, wanted, slope, allow_unused=True)
    first, *others = (torch.zeros_like(tensor) if one is None else one for tensor, one in zip(wanted, found, strict=True))
    return first.detach(), dict(zip(parameters, others, strict=True))


@contextmanager
def unhooked(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While inside, no hook of the blocks themselves is called; those of what is inside them are."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(vars(block), name, vars(block)[name]) for block in blocks for name in names]
    for own, name, hooks in before:
        own[name] = type(hooks)()
    try:
        yield
    finally:
        for own, name, hooks in before:
            own[name] = hooks


@contextmanager
def requiring(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While inside, these parameters take part in graphs."""
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
