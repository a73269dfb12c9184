"""Which parameters the optimizers of a recording hold, looked up anew when a loop adds some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prunekit.errors import UsageError
from prunekit.trajectory.describe import describe_optimizers
from prunekit.trajectory.layout import Layout
from prunekit.trajectory.rules import optimizer_parts
from prunekit.trajectory.watch import ADVICE


class Members:
    """What optimizers hold.

    Args:
        described: the optimizers as the recording's header has them; ``add_groups`` extends it in place.

    Attributes:
        groups: of each optimizer, its groups as they were described.
        stepped: of each optimizer, names and parameters that are recorded.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, optimizers: Sequence[torch.optim.Optimizer], described: dict[str, Any]
    ) -> None:
        self.model, self.optimizers, self.described = model, optimizers, described
        self._recorded = {entry.name for entry in layout}
        self._look()

    @property
    def changed(self) -> bool:
        """Whether a group was added, or its parameters changed in number."""
        return self._sizes != self._sizes_now()

    def add_groups(self) -> None:
        """Takes in parameter groups that a loop added (``add_param_group``).

        Raises:
            UsageError: the parameters of older groups changed, or new ones were frozen when recording began.
        """
        now = optimizer_parts(describe_optimizers(self.model, self.optimizers))
        for mine, theirs in zip(optimizer_parts(self.described), now, strict=True):
            known, new = theirs["groups"][: len(mine["groups"])], theirs["groups"][len(mine["groups"]) :]
            if [set(g["parameters"]) & self._recorded for g in known] != [set(g["parameters"]) for g in mine["groups"]]:
                raise UsageError("parameters of an optimizer's groups changed while recording; add a group (add_param_group)")
            for group in new:
                if strange := [name for name in group["parameters"] if name not in self._recorded]:
                    raise UsageError(f"{strange[0]} was frozen when recording began and is trained now: {ADVICE}")
            mine["groups"].extend(new)
        self._look()

    def _look(self) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.groups = [part["groups"] for part in optimizer_parts(self.described)]
        self.stepped = [
            [(names[id(p)], p) for group in one.param_groups for p in group["params"] if names.get(id(p)) in self._recorded]
            for one in self.optimizers
        ]
        self._sizes = self._sizes_now()

    def _sizes_now(self) -> list[int]:
        return [len(group["params"]) for one in self.optimizers for group in one.param_groups]
