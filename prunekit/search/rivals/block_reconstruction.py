"""Blocks trained to give what the dense model's give, one after the other, under masks that are held (arXiv 2510.14444).

Wagner et al. 2025 ("A Free Lunch in LLM Compression"): where whole blocks are reconstructed by gradient descent, simple masks
such as Wanda's do as well as others. Block k gets what the pruned and trained blocks before it give, and its parameters, all but
what the mask removes, are trained on ``|h - h*|² / |h*|²``, ``h*`` the dense model's hidden states after its own block k. Every
block sees the same batches, in the same order. Adam, at a rate that falls to 0 in a straight line. What lies outside the blocks
keeps its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.apply import masked
from prunekit.batch import Inputs, call, fresh, to
from prunekit.errors import NonFiniteError, UsageError
from prunekit.measure.undisturbed import undisturbed
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.repair.live import blocks_of
from prunekit.repair.stream import Stream
from prunekit.structure.replacements import first_tensor

RATE = 3e-4


@dataclass(frozen=True)
class BlockError:
    """``|h - h*|² / |h*|²`` after a block over one batch that no block is trained on, before and after it was trained."""

    block: str
    before: float
    after: float


def reconstructed(
    plan: Plan, model: nn.Module, stream: Stream, *, steps: int, rate: float = RATE
) -> tuple[nn.Module, list[BlockError]]:
    """The masked model with its blocks' new weights, and each block's error.

    The stream's first batch measures; ``steps`` more are learnt from. Models up to a block are run again for every batch, so that
    nothing is held of the batches.

    Raises:
        UsageError: the model has no list of blocks.
        NonFiniteError: a block's error is NaN or Inf.
    """
    pruned = masked(model, plan).eval()
    device = next(model.parameters()).device
    masks = {name: mask.to(device) for name, mask in plan.masks().items()}
    theirs, ours = blocks_of(model), blocks_of(pruned)
    names = {id(module): name for name, module in pruned.named_modules()}
    found: list[BlockError] = []
    with undisturbed(model), Bar("block-reconstruction", steps * len(ours)) as bar:
        for dense, block in zip(theirs, ours, strict=True):
            name = names[id(block)]
            held = {n: masks[f"{name}.{n}"] for n, _ in block.named_parameters() if f"{name}.{n}" in masks}
            batches = (to(x, device) for x, _ in stream)
            fresh = next(batches)
            before = _measured(model, dense, pruned, block, fresh)
            _train(model, dense, pruned, block, held, islice(batches, steps), steps, rate, bar.advance)
            found.append(BlockError(name, before, _measured(model, dense, pruned, block, fresh)))
            if not math.isfinite(found[-1].after):
                raise NonFiniteError(f"{name}: its error is {found[-1].after} after {steps} steps; lower rate")
    return pruned, found


def _train(
    model: nn.Module,
    dense: nn.Module,
    pruned: nn.Module,
    block: nn.Module,
    masks: dict[str, Tensor],
    batches: Iterator[Inputs],
    steps: int,
    rate: float,
    advance: Callable[[], Any],
) -> None:
    parameters = dict(block.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.is_floating_point()}
    wanted = {name: parameter.requires_grad for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.values(), lr=rate)
    for step, x in enumerate(batches):
        error = _error(model, dense, pruned, block, x)
        optimizer.zero_grad()
        error.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
        advance()
    optimizer.zero_grad()
    for name, parameter in trained.items():
        parameter.requires_grad_(wanted[name])


@torch.no_grad()
def _measured(model: nn.Module, dense: nn.Module, pruned: nn.Module, block: nn.Module, x: Inputs) -> float:
    return float(_error(model, dense, pruned, block, x))


def _error(model: nn.Module, dense: nn.Module, pruned: nn.Module, block: nn.Module, x: Inputs) -> Tensor:
    """Of the pruned model's block where its own blocks before it lead, against the dense one's in the dense model."""
    with torch.no_grad():
        args, keywords = _reached(model, dense, x)
        aim = _hidden(dense(*args, **keywords), dense)
        args, keywords = _reached(pruned, block, x)
    found = _hidden(block(*args, **keywords), block)
    return (found - aim).float().square().sum() / aim.float().square().sum().clamp_min(1e-30)


def _hidden(answer: Any, block: nn.Module) -> Tensor:
    found = answer[0] if isinstance(answer, tuple | list) else answer
    if not isinstance(found, Tensor):
        raise UsageError(f"block-reconstruction: a block ({type(block).__name__}) gives {type(found).__name__}, no hidden states")
    return found


class _Reached(BaseException):
    """The block was called: what the model would do afterwards is not needed. A model's own ``except`` lets it pass."""


def _reached(model: nn.Module, block: nn.Module, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with.

    Raises:
        UsageError: it is not called.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((args, keywords))
        raise _Reached

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call(model, fresh(x))
    except _Reached:
        pass
    finally:
        hook.remove()
    if not found or first_tensor(*found[0]) is None:
        raise UsageError(
            f"block-reconstruction: a block ({type(block).__name__}) is not called with hidden states on these samples"
        )
    return found[0]
