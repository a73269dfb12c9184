"""Influence while training goes on: scores are added up step by step, and no trajectory is kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Inputs, Labels, size
from prunekit.criteria.additive import collect
from prunekit.criteria.aggregations import written
from prunekit.criteria.identity import state_digest
from prunekit.criteria.scores import Scores
from prunekit.data.identity import digest_of_tensors
from prunekit.errors import PrunekitError
from prunekit.kernel import Contribution, ModelFunction, get_rule, targets_of
from prunekit.kernel.attribution import MEMORY
from prunekit.kernel.gradients import GradientEngine, choose_engine
from prunekit.structure.prunable import kept_layers, prunable_parameters
from prunekit.task import Target, Task, get_task
from prunekit.trajectory.bare import bare, bare_optimizer
from prunekit.trajectory.describe import describe_optimizer, flat_second_moments, group_options, skipped, without_gradient
from prunekit.trajectory.layout import Layout, fixed_state
from prunekit.trajectory.rules import Recursion, StepLog, start_counts


class OnlineInfluence:
    """Adds up the kernel share of every optimizer step, for scoring samples that are known beforehand.

    ```python
    with OnlineInfluence(model, optimizer, x, y) as online:
        ...                                   # any training loop
    scores = online.scores()
    ```

    Args:
        model, optimizer: as for ``Recorder``.
        x, y: scoring samples and labels.
        target: what is explained, as in ``score``.
        task: what the model is for.
        nodes, rule: quadrature of a step.
        aggregation: see ``AGGREGATIONS``.
        ignore, include: as in ``score``.
        memory: bytes that the signed scores, ``samples × targets × P`` numbers, may take.

    Raises:
        PrunekitError: they take more; score offline, or give fewer samples.

    Example:
        >>> import torch
        >>> from prunekit import OnlineInfluence
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(8, 4)
        >>> y = x[:, 0].gt(0).long()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with OnlineInfluence(model, optimizer, x, y, target="margin") as online:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        >>> online.scores().importance["0.weight"].shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Inputs,
        y: Labels,
        target: str | Target = "outputs",
        *,
        task: str | Task | None = None,
        nodes: int = 1,
        rule: str = "midpoint",
        aggregation: str = "l1",
        ignore: Sequence[str] = (),
        include: Sequence[str] = (),
        memory: int = MEMORY,
    ) -> None:
        self.model, self.optimizer, self.x, self.y = bare(model), bare_optimizer(optimizer), x, y
        model = self.model
        self.layout = Layout.of(model)
        self.prunable = tuple(prunable_parameters(model, self.layout, list(ignore), list(include)))
        self.kept = kept_layers(model, list(ignore))
        self.quadrature = get_rule(rule, nodes)
        device = next(model.parameters()).device
        self.function = ModelFunction(model, self.layout, fixed_state(model, self.layout), target, device, task=get_task(task))
        self.facts: dict[str, Any] = {
            "target": target if isinstance(target, str) else getattr(target, "__qualname__", "user's function"),
            "rule": rule, "nodes": nodes, "aggregation": written(aggregation), "share": "kernel",
        }  # fmt: skip
        self._memory = memory
        self._engine: GradientEngine | None = None
        self._counts: dict[str, int] = {}
        self._hash = hashlib.sha256()

    def __enter__(self) -> OnlineInfluence:
        self._theta = self._flat()
        self._description = describe_optimizer(self.model, self.optimizer)
        self._running = torch.zeros_like(self._theta)
        states = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.model.named_parameters()}
        self._counts = start_counts(self._description, states)
        targets, samples = targets_of(self.function, self._theta, self.x, self.y), size(self.x)
        needed = samples * targets * self.layout.total * self._theta.element_size()
        if needed > self._memory:
            raise PrunekitError(
                f"online scores of {samples} samples × {targets} targets take {needed / 2**20:.0f} MiB, memory is "
                f"{self._memory / 2**20:.0f} MiB; give fewer samples or one target, raise memory, or record and score later"
            )
        self.total = {e.name: self._theta.new_zeros(samples, targets, *e.shape) for e in self.layout.parameters}
        self._started = time.perf_counter()
        self._hook = self.optimizer.register_step_post_hook(self._after_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer):
            return
        before, after = self._theta, self._flat()
        missing = frozenset(without_gradient(self.model, optimizer))
        step = StepLog(tuple(group_options(g) for g in optimizer.param_groups), without_gradient=missing)
        recursion = Recursion(self.layout, self._description, [step], True, self._counts)
        share = torch.zeros_like(before)
        moments = None
        if any(rule is not None and rule.second_moments for rule in recursion.rules):
            moments = flat_second_moments(self.model, optimizer, self.layout.parameters, torch.empty_like(before))
        recursion.regularisation(0, before, moments, self._running, share)
        for name in (n for group in self._description["groups"] for n in group["parameters"] if n not in missing):
            self._counts[name] = self._counts.get(name, 0) + 1
        self.facts["note"] = recursion.note
        if self._engine is None:
            self._engine = choose_engine(self.function, after, self.x, self.y)
        moved = after - before - share
        for node, weight in self.quadrature:
            scale = self.layout.views(moved * weight)
            self._engine.accumulate(torch.lerp(before, after, node), self.x, self.y, scale, self.total)
        self._hash.update(after.cpu().numpy().data)
        self._theta = after

    def scores(self) -> Scores:
        """The scores so far, as ``score`` gives them; they belong to the weights that the model has now.

        ``provenance["trajectory"]`` is a hash of the states seen, for which no trajectory exists.
        """
        samples = size(self.x)
        whole = slice(0, samples)
        part = Contribution(whole, slice(0, next(iter(self.total.values())).shape[1]), self.total)
        shape = (samples, part.targets.stop)
        with ranks.apart():  # each has all samples
            importance, axes = collect(lambda skip: [part], shape, self.prunable, self.facts["aggregation"])
        facts = {
            "criterion": "influence",
            "group": "sum",
            "trajectory": f"online-{self._hash.hexdigest()[:25]}",
            "model": state_digest(self._theta),
            "prunable": list(self.prunable),
            **({"kept": self.kept} if self.kept else {}),
            "samples": samples,
            "data": digest_of_tensors((self.x, self.y)),
            **self.facts,
        }
        uncovered = {n: count for n, v in importance.items() if (count := int((v == 0).sum()))}
        cost = {"seconds": round(time.perf_counter() - self._started, 3)}
        return Scores(importance, axes, facts, {"uncovered": uncovered}, cost)

    def _flat(self) -> Tensor:
        return self.layout.state(self.model)
