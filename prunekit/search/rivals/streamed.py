"""Rivals that learn from a stream of fresh batches, at the size of language models: a plain dict from name to function.

Each takes a plan (which says how many weights stay, or the pattern, and where the rival starts), the dense model, a stream, and
the number of steps, one batch each, so that all that take as many see as many tokens. Each gives a plan and the pruned model,
masked: with the dense weights, or for ``block-reconstruction`` with new ones. Rates by default are those of the papers or their
authors' scripts, for 2,000 steps; for other numbers of steps they are to be chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from prunekit.apply import masked
from prunekit.errors import UsageError
from prunekit.plan import Plan
from prunekit.repair.stream import Stream
from prunekit.search.rivals.block_reconstruction import reconstructed
from prunekit.search.rivals.leap import leap_mask
from prunekit.search.rivals.maskllm import maskllm_mask
from prunekit.structure import GROUPED
from prunekit.task import Task, get_task

Learnt = tuple[Plan, nn.Module]
"""What stays, and the model with it: of the dense model's shape, on its device, zeros where the plan removes."""


class StreamedRival(Protocol):
    def __call__(
        self,
        plan: Plan,
        model: nn.Module,
        stream: Stream,
        *,
        steps: int,
        task: str | Task | None = None,
        rate: float | None = None,
        seed: int = 0,
    ) -> Learnt: ...


def _mask(
    plan: Plan,
    model: nn.Module,
    stream: Stream,
    *,
    rival: str,
    learn: Callable[..., dict[str, Tensor]],
    steps: int,
    task: str | Task | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Learnt:
    """A mask for the dense weights."""
    _check(plan, steps, rate)
    options = {} if rate is None else {"rate": rate}
    keep = learn(plan, model, stream, get_task(task), steps=steps, seed=seed, **options)
    facts = {"rival": rival, "steps": steps, "batch": stream.batch_size, "seed": seed, **options}
    found = replace(plan, keep=keep, provenance={**plan.provenance, "learnt": facts})
    return found, masked(model, found)


def block_reconstruction(
    plan: Plan,
    model: nn.Module,
    stream: Stream,
    *,
    steps: int,
    task: str | Task | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Learnt:
    """New weights under the plan's own mask, block after block, see ``prunekit.search.rivals.block_reconstruction``.

    Every block takes ``steps`` steps over the same batches. It draws nothing and looks at no labels: ``task`` and ``seed`` say
    nothing.
    """
    _check(plan, steps, rate)
    pruned, _ = reconstructed(plan, model, stream, steps=steps, **({} if rate is None else {"rate": rate}))
    return plan, pruned


STREAMED: dict[str, StreamedRival] = {
    "leap": partial(_mask, rival="leap", learn=leap_mask),
    "maskllm": partial(_mask, rival="maskllm", learn=maskllm_mask),
    "block-reconstruction": block_reconstruction,
}


def _check(plan: Plan, steps: int, rate: float | None) -> None:
    if plan.structure in GROUPED:
        raise UsageError(f"learnt rivals take single weights, and the plan's structure is {plan.structure}; prune weights or N:M")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"steps is {steps!r}; it must be a whole number from 1 upwards")
    if rate is not None and not 0 < rate < float("inf"):
        raise UsageError(f"rate is {rate!r}; it must be above 0")
