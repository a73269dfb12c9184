"""A model as rows of blocks that hand their outputs on: which modules these are, and what each is called with.

A stack is a ``ModuleList`` whose items are called once each, in order, each with the hidden states that the one before it gave.
What else a block is called with (masks, positions) may not depend on hidden states. Both are looked at on one sample, since a
model may do anything between its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Inputs, call, fresh, leaves, mapped, named
from prunekit.blocks.homes import Home

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks of a model, in the order in which they run.

    Attributes:
        name: of the module list, dotted.
        blocks: its items.
    """

    name: str
    blocks: list[nn.Module]


class Enough(BaseException):
    """The last block was reached: what the model would do with its outputs is not needed. A model's own ``except`` passes it."""


@dataclass
class Watch:
    """What the blocks of a stack were called with in one forward pass, by their numbers, and what they gave."""

    calls: list[tuple[int, Call]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)


def stacks_of(model: nn.Module, holding: Collection[str], inputs: Inputs, home: Home) -> tuple[list[Stack], dict[str, str]]:
    """The model's stacks with any of the parameters ``holding``, in the order in which they run; the other lists, and why not.

    Module lists inside a stack's blocks are the block's own business.

    Args:
        inputs: of one sample.
        home: where the model's weights lie.
    """
    lists = lists_of(model, holding)
    watches = [Watch() for _ in lists]
    order: list[Stack] = []
    with ExitStack() as exits:
        for stack, watch in zip(lists, watches, strict=True):
            exits.enter_context(computing(stack, home, watch))
            hook = stack.blocks[0].register_forward_pre_hook(lambda *_, stack=stack: order.append(stack))
            exits.callback(hook.remove)
        call(model, fresh(inputs))
    faults = {}
    for stack, watch in zip(lists, watches, strict=True):
        fault = _fault(stack, watch)
        if fault is None and not _passed_alike(watch, passed_over(model, stack, lists, inputs, home)):
            fault = "what its blocks are called with depends on hidden states"
        if fault is not None:
            faults[stack.name] = fault
    return [stack for stack in dict.fromkeys(order) if stack.name not in faults], faults


def lists_of(model: nn.Module, holding: Collection[str]) -> list[Stack]:
    """Module lists with any of the parameters ``holding``, that lie in no other such list."""
    found: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other.name}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside and any(parameter.startswith(f"{name}.") for parameter in holding):
            found.append(Stack(name, list(module)))
    return found


def _fault(stack: Stack, watch: Watch) -> str | None:
    """Why a list's items are no stack."""
    if [number for number, _ in watch.calls] != list(range(len(stack.blocks))):
        return "its items are not called once each, in order"
    if any(hidden_of(each) is None for _, each in watch.calls):
        return "its items are not called with one tensor first"
    following = zip(watch.answers, watch.calls[1:], strict=False)
    if not all(_very(first_tensor(answer), hidden_of(each)) for answer, (_, each) in following):
        return "what an item gives is not what the next one gets"
    return None


def _passed_alike(watch: Watch, calls: list[Call]) -> bool:
    """Whether blocks that are passed over are called with what they were called with when all ran, but for the hidden states."""
    return len(calls) == len(watch.calls) and all(
        _same_rest(mine, other) for (_, mine), other in zip(watch.calls, calls, strict=True)
    )


def passed_over(model: nn.Module, stack: Stack, stacks: Sequence[Stack], inputs: Inputs, home: Home) -> list[Call]:
    """What every block is called with: right for the first, and for the others but for the hidden states.

    The first block runs, since the model may look at what it gives beside hidden states; of the others none does.

    Args:
        stacks: of the model; blocks of others run as they are.
    """
    watch = Watch()
    with ExitStack() as exits, suppress(Enough):
        for other in stacks:
            mine = other is stack
            exits.enter_context(computing(other, home, watch if mine else None, skip=mine))
        call(model, fresh(inputs))
    return [each for _, each in watch.calls]


@contextmanager
def computing(stack: Stack, home: Home, watch: Watch | None = None, skip: bool = False) -> Iterator[None]:
    """While inside, blocks compute on their device, one at a time, and what they are called with and give is noted.

    Args:
        skip: all but the first give that one's answer, and the last ends the pass.
    """

    def instead(number: int, forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if watch is not None:
                watch.calls.append((number, _own((args, kwargs)) if skip and not number else (args, kwargs)))
                if skip and number == len(stack.blocks) - 1:
                    raise Enough
                if skip and number and watch.answers:
                    return watch.answers[0]
            came_from = next((tensor.device for tensor in leaves((args, kwargs))), home.device)
            with home.present(block):
                answer = on(forward(*on(args, home.device), **on(kwargs, home.device)), came_from)
            if watch is not None:
                watch.answers.append(answer)
            return answer

        return stand_in

    with replaced(stack.blocks, instead):
        yield


@contextmanager
def replaced(
    blocks: Sequence[nn.Module], instead: Callable[[int, Callable[..., Any], nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """While inside, ``instead(number, forward, block)`` runs where a block's own forward did."""
    with ExitStack() as exits:
        for number, block in enumerate(blocks):
            exits.callback(_put_back, block, vars(block).get("forward"))
            vars(block)["forward"] = instead(number, block.forward, block)
        yield


def _put_back(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del vars(block)["forward"]
    else:
        vars(block)["forward"] = forward


def on(nest: Any, device: torch.device) -> Any:
    """The same nest on ``device``; what is there already is the same tensor."""
    return mapped(nest, lambda tensor: tensor if tensor.device == device else tensor.to(device))


def first_tensor(answer: Any) -> Tensor | None:
    """The hidden states in what a block gives: it, or the first of several."""
    return next(iter(leaves(answer)), None)


def hidden_of(arguments: Call) -> Tensor | None:
    """The hidden states among a block's arguments: the first one."""
    args, kwargs = arguments
    first = args[0] if args else next(iter(kwargs.values()), None)
    return first if isinstance(first, Tensor) else None


def with_hidden(arguments: Call, hidden: Tensor) -> Call:
    """The same arguments with other hidden states."""
    args, kwargs = arguments
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, next(iter(kwargs)): hidden}


def _own(arguments: Call) -> Call:
    """The same arguments with hidden states that a block cannot change in place."""
    hidden = hidden_of(arguments)
    return arguments if hidden is None else with_hidden(arguments, hidden.clone())


def _very(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are the same numbers in memory."""
    if one is None or other is None:
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _same_rest(one: Call, other: Call) -> bool:
    """Whether both calls agree in all but the hidden states."""
    mine, theirs = (named(with_hidden(each, torch.empty(0))) for each in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
