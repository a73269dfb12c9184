"""A model in training whose masks are held, whose steps are recorded, and whose weights may be set on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply import apply_masks, hold_masks
from prunekit.apply.masks import keep_zero
from prunekit.steps.low_rank import LowRank
from prunekit.trajectory import Polygon, Recorder, Trajectory
from prunekit.trajectory.bare import bare_optimizers, named_tensors


class Held:
    """Masks held (they may shrink on the way) and steps recorded, whatever loop takes them.

    Args:
        model: trained in place.
        masks: True stays; applied on entering.
        optimizer: one or several, in wrappers or without.
        recorder: not yet entered; None records nothing.
        low_rank: what the optimizer trains in the place of the model's own parameters; None where it trains these.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        optimizer: Any,
        recorder: Recorder | Polygon | None,
        low_rank: LowRank | None = None,
    ) -> None:
        self.model = model
        self.low_rank = low_rank
        self.optimizers = bare_optimizers(optimizer)
        self._masks = dict(masks)
        self._recorder = recorder

    def __enter__(self) -> Held:
        self._stack = ExitStack()
        try:
            # The mapping is held, not copied: shrinking it later is all that it takes. Before the recorder, so that its
            # hook comes first and states are recorded with the masks in place.
            if self.low_rank is None:
                self._stack.enter_context(hold_masks(self.model, self._masks, self.optimizers))
            else:
                self._stack.enter_context(self.low_rank.followed(self._masks, self.optimizers))
                self._stack.enter_context(keep_zero(self.model, self._masks, self.optimizers))
            if self._recorder is not None:
                with ranks.apart():  # the first one's writes, and none waits for that
                    self._stack.enter_context(self._recorder)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with ranks.apart():
            self._stack.__exit__(kind, error, trace)
        self._recorder = None

    def shrink(self, masks: Mapping[str, Tensor]) -> None:
        """Goes on with smaller masks. What they remove is zeroed, its optimizer state as well: one piece of the path."""
        self.swap({**self._masks, **masks}, {})

    def swap(self, masks: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Goes on with other masks: one piece of the path.

        What comes back takes its value from ``values`` (0 where they have none), what goes is zeroed; the optimizer's state
        of both is emptied. Tensors that ``masks`` do not name are whole from now on.
        """
        named = named_tensors(self.model)
        old: dict[str, Tensor] = {}
        for name in {**self._masks, **masks}:
            whole = torch.ones(named[name].shape, dtype=torch.bool)
            old[name] = self._masks.get(name, whole).cpu()
            self._masks[name] = masks.get(name, whole).cpu()

        @torch.no_grad()
        def change() -> None:
            for name, value in values.items():
                if name in old:
                    back = (self._masks[name] & ~old[name]).to(named[name].device)
                    named[name].copy_(torch.where(back, value.to(named[name]), named[name]))

        self.set(change)
        for name in old:
            stayed = self._masks[name] & old[name]
            for optimizer in self.optimizers:
                for state in optimizer.state.get(named[name], {}).values():  # a buffer has none
                    if isinstance(state, Tensor) and state.shape == stayed.shape:
                        state.mul_(stayed.to(state.device, state.dtype))

    def set(self, change: Callable[[], object]) -> None:
        """Lets ``change`` set the weights or statistics; masks are put back after it."""
        with ExitStack() as stack:
            if self._recorder is not None:
                stack.enter_context(self._recorder.jump())
            change()
            apply_masks(self.model, self._masks)

    def so_far(self) -> Trajectory | None:
        """What is recorded by now, opened; None when nothing is."""
        if self._recorder is None:
            return None
        self._recorder.flush()
        return Trajectory(self._recorder.folder)
