"""The model as a function of its weights: ``f(x; θ)`` with θ one flat vector."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

from prunekit.batch import Inputs, Labels, arguments, fresh, mapped, size, take
from prunekit.errors import PrunekitError, UsageError
from prunekit.kernel.statistics import Statistics, differentiable_statistics, own_statistics
from prunekit.task import Target, Task, get_task
from prunekit.traceless import traceless
from prunekit.trajectory.copies import copied
from prunekit.trajectory.layout import Layout, as_path, path_dtype

OF_KINDS = r"dtype|scalar type|type \(.*\) should be the same"
"""What torch says of two tensors that a product takes only of one kind."""


class ModelFunction:
    """A private copy of ``model``, called with any state of the layout.

    It computes in float32, in float64 where a parameter of ``model`` is: a model in half precision, and its inputs, are widened.

    Args:
        model: its own weights do not matter, except the parts outside ``layout`` and ``fixed``.
        layout: the path's coordinates.
        fixed: tensors beside the path (frozen parameters, integer buffers) by name.
        target: a name that ``task`` has, or a function ``(outputs, labels) -> (samples, targets)``.
        device: where to compute.
        training: run it as in training (dropout, a batch's own statistics) instead of evaluation mode.
        task: which of the model's answers counts; classification when None.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        fixed: Mapping[str, Tensor] | None = None,
        target: str | Target = "outputs",
        device: torch.device | str = "cpu",
        training: bool = False,
        task: Task | None = None,
    ) -> None:
        self.device, self._training = torch.device(device), training
        self.model = copied(model).train(training).requires_grad_(False).to(self.device)
        self._dtype = path_dtype(model)
        self._several = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
        as_path(self.model, self._dtype)
        own_statistics(self.model) if training else differentiable_statistics(self.model)
        if fixed:
            self.model.load_state_dict(dict(fixed), strict=False)
        self.layout, self.task = layout, get_task(task)
        self.target = self.task.get_target(target)
        self._forward: bool | None = None  # whether this model has forward mode; tried once
        self._seen: tuple[bool, bool] | None = None  # what the first run showed: see ``_watched``

    def aimed(self, target: str | Target) -> ModelFunction:
        """The same function with another target; the model is shared."""
        other = copy.copy(self)
        other.target = self.task.get_target(target)
        return other

    def narrowed(self, targets: slice) -> ModelFunction:
        """The same function with some of its targets only; the model is shared."""
        other, whole = copy.copy(self), self.target
        other.target = lambda out, labels: whole(out, labels)[:, targets]
        return other

    def __call__(self, theta: Tensor, x: Inputs, y: Labels) -> Tensor:
        """Target values ``(samples, targets)`` at the flat state ``theta`` ``(P,)``."""
        return self.named(self.layout.views(theta), x, y)

    def named(self, state: Mapping[str, Tensor], x: Inputs, y: Labels) -> Tensor:
        """The same, from tensors by name."""
        with plain_kernels():
            positional, keywords = arguments(fresh(mapped(x, self._widened)))
            answer = self._watched(partial(functional_call, self.model, dict(state), positional, keywords))
            return self._target(answer, y)

    def _watched(self, run: Callable[[], Any]) -> Any:
        """Runs the model: what it would keep of these weights is not there at others, statistics are differentiable.

        The first run shows whether a model needs either; one that does not is run as it is from then on.
        """
        keeps, normalises = self._seen or (True, not self._training)
        if not keeps and not normalises:
            return run()
        with Statistics() if normalises else nullcontext() as statistics, traceless(self.model) as left, self._in_one_kind():
            answer = run()
        if self._seen is None:
            self._seen = bool(left), statistics is not None and statistics.met
        return answer

    @contextmanager
    def _in_one_kind(self) -> Iterator[None]:
        """While inside, a model whose layers are of several kinds, and which fails in one, is refused by these."""
        try:
            yield
        except RuntimeError as error:
            if len(self._several) < 2 or not re.search(OF_KINDS, str(error)):
                raise
            raise UsageError(
                f"the model computes in {' and '.join(self._several)}, and cannot in {str(self._dtype).removeprefix('torch.')} "
                f"alone, in which its weights are looked at together ({str(error)[:100]}); give it in one, such as model.float()"
            ) from error

    def _widened(self, tensor: Tensor) -> Tensor:
        """Inputs in half precision meet a model that is not: it computes as the path is kept; outputs under autocast alike."""
        return tensor.to(self._dtype) if tensor.is_floating_point() and tensor.element_size() < 4 else tensor

    def _target(self, answer: Any, y: Labels) -> Tensor:
        outputs = self._widened(self.task.outputs(answer))
        try:
            with torch.autocast(self.device.type, enabled=False):  # divergences are small differences: no bfloat16 holds them
                found = self.target(outputs, mapped(y, self._widened))
        except PrunekitError:
            raise
        except Exception as error:  # labels that do not fit, or a target of the user's
            raise self.task.cause("target", outputs, y, error) from error
        if not isinstance(found, Tensor) or found.dim() != 2:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"target: must be (samples, targets) for outputs {tuple(outputs.shape)}, it is {what}")
        return found

    @torch.no_grad()
    def directional(self, theta: Tensor, direction: Tensor, x: Inputs, y: Labels) -> tuple[Tensor, Tensor]:
        """Values and derivative along ``direction`` ``(P,)``, both ``(samples, targets)``: forward mode, no Jacobian.

        Where a model has no forward mode (an autograd function of its own), or one that plain autograd does not confirm on the
        first samples, a backward pass a sample and target takes its place.
        """
        if self._forward is None:
            self._forward = self._has_forward_mode(theta, direction, x, y)
        return self._jvp(theta, direction, x, y) if self._forward else self._by_gradients(theta, direction, x, y)

    def _jvp(self, theta: Tensor, direction: Tensor, x: Inputs, y: Labels) -> tuple[Tensor, Tensor]:
        views = self.layout.views
        found = jvp(lambda state: self.named(state, x, y), (views(theta),), (views(direction),))
        return found[0], found[1].to(found[0])  # the derivative of some losses comes in double precision

    def _by_gradients(self, theta: Tensor, direction: Tensor, x: Inputs, y: Labels) -> tuple[Tensor, Tensor]:
        """By reverse mode; a batch whose samples may share statistics (training mode) is run as a whole."""
        samples, views = size(x), self.layout.views(direction)
        together = samples if self.model.training else 1
        values, slopes = [], []
        with self.at(theta) as leaves:
            for begin in range(0, samples, together):
                where = slice(begin, begin + together)
                found = self.here(take(x, where), take(y, where, samples))
                values.append(found.detach())
                slope = torch.zeros_like(found)
                for place in range(found.numel() if found.requires_grad else 0):
                    one = torch.autograd.grad(found.view(-1)[place], list(leaves.values()), retain_graph=True, allow_unused=True)
                    parts = [(g * views[name]).sum() for name, g in zip(leaves, one, strict=True) if g is not None]
                    slope.view(-1)[place] = torch.stack(parts).sum() if parts else 0.0
                slopes.append(slope.detach())
        return torch.cat(values), torch.cat(slopes)

    def _has_forward_mode(self, theta: Tensor, direction: Tensor, x: Inputs, y: Labels) -> bool:
        samples = size(x)
        few = slice(0, min(2, samples))
        part = take(x, few), take(y, few, samples)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                found = self._jvp(theta, direction, *part)[1]
        except Exception:  # whatever torch or the model says to forward mode: the slow way is there
            return False
        with torch.random.fork_rng(devices=devices):
            expected = self._by_gradients(theta, direction, *part)[1]
        return torch.allclose(found, expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max() + 1e-6))

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[dict[str, Tensor]]:
        """The private model itself at ``theta``: name -> leaf that requires a gradient, of every coordinate.

        Weights are in the modules' own parameters, not in place of them: a layer that is run again in the backward pass
        (checkpointing), or that keeps lists of its weights (recurrent layers), sees the same ones.
        """
        parameters, leaves, places = dict(self.model.named_parameters()), {}, []
        views = self.layout.views(theta.detach())
        with torch.no_grad():
            for entry in self.layout:
                value = views[entry.name]
                if entry.kind == "parameter":
                    parameter = parameters[entry.name]
                    parameter.data.copy_(value)
                    leaves[entry.name] = parameter.requires_grad_(True)
                    continue
                owner, _, short = entry.name.rpartition(".")
                module = self.model.get_submodule(owner)
                places.append((module, short, module._buffers[short]))
                module._buffers[short] = leaves[entry.name] = value.clone().requires_grad_(True)
        try:
            with torch.enable_grad(), plain_kernels():
                yield leaves
        finally:
            for module, short, buffer in places:
                module._buffers[short] = buffer
            for entry in self.layout.parameters:
                parameters[entry.name].requires_grad_(False)

    def here(self, x: Inputs, y: Labels) -> Tensor:
        """Target values of the private model as it is, inside ``at``."""
        positional, keywords = arguments(fresh(mapped(x, self._widened)))
        return self._target(self._watched(partial(self.model, *positional, **keywords)), y)

    def gradient(self, theta: Tensor, x: Inputs, y: Labels, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values ``(samples, targets)``, and the gradient ``(P,)`` of their sum, or of ``Σ weights · values``."""
        with self.at(theta) as leaves:
            values = self.here(x, y)
            total = values.sum() if weights is None else (values * weights).sum()
            found = (
                torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                if total.requires_grad
                else (None,) * len(leaves)
            )
        return values.detach(), self._flat(theta, found)

    def gradients(self, theta: Tensor, x: Inputs, y: Labels, use: Callable[[int, Tensor], None]) -> None:
        """Gives ``use`` every target's number and gradient ``(P,)`` of one sample: ``gradient``'s, of one run of the model."""
        with self.at(theta) as leaves:
            (values,) = self.here(x, y)
            for number, value in enumerate(values):
                found: Sequence[Tensor | None] = (None,) * len(leaves)
                if value.requires_grad:
                    more = number + 1 < len(values)
                    found = torch.autograd.grad(value, list(leaves.values()), retain_graph=more, allow_unused=True)
                with torch.no_grad():
                    use(number, self._flat(theta, found))

    def _flat(self, theta: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
        flat = torch.zeros_like(theta.detach())
        for entry, part in zip(self.layout, parts, strict=True):
            if part is not None:
                flat[entry.span] = part.reshape(-1)
        return flat


@contextmanager
def plain_kernels(attention: bool = True) -> Iterator[None]:
    """Without fused attention and torch's fused encoder layers, which have neither forward mode nor per-sample gradients, and

    with re-entrant checkpointing taken out, which allows no gradient of chosen tensors; it changes memory, not numbers.

    Args:
        attention: fused attention is taken out too; a first derivative of a whole batch does not need that.
    """
    fast, outer = torch.backends.mha.get_fastpath_enabled(), vars(CheckpointFunction).get("apply")
    torch.backends.mha.set_fastpath_enabled(False)
    CheckpointFunction.apply = staticmethod(_run_once)  # type: ignore[method-assign]
    try:
        with sdpa_kernel(SDPBackend.MATH) if attention else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if outer is None:
            del CheckpointFunction.apply  # torch's own, which the class inherits, is there again
        else:
            CheckpointFunction.apply = outer  # type: ignore[method-assign]


def _run_once(run: Callable[..., Any], keeps_draws: bool, *arguments: Any) -> Any:
    return run(*arguments)
