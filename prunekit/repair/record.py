"""What a repair found: the best mask so far, how it came about, and the plan that tells of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from prunekit.plan import Plan
from prunekit.repair.swaps import Swaps
from prunekit.task import Target

PARTED = 2.0  # a note is made when the accept part's divergence over the learn part's has grown by more than this


@dataclass
class Record:
    """The best mask ``(U,)`` so far, its target on what is learnt from and on what judges, and every mask that was judged."""

    keep: Tensor
    learn: float
    accept: float
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = (self.learn, self.accept)
        self.history.append(
            {"stage": "given", "round": 0, "learn": self.learn, "accept": self.accept, "swapped": 0, "kept": True}
        )

    def judge(self, candidate: Tensor, learn: float, accept: float, facts: Mapping[str, Any]) -> bool:
        """Takes ``candidate`` if it is better on the accept part, and writes the history either way."""
        taken = accept < self.accept
        swapped = int((candidate & ~self.keep).sum())
        self.history.append({**facts, "learn": learn, "accept": accept, "swapped": swapped, "kept": taken})
        if taken:
            self.keep, self.learn, self.accept = candidate, learn, accept
        return taken

    def plan(
        self,
        plan: Plan,
        swaps: Swaps,
        *,
        target: str | Target,
        samples: tuple[int, int],
        ended: str,
        options: Mapping[str, Any],
        **more: Any,
    ) -> Plan:
        """``plan`` with this mask in its place, and in its provenance what was found.

        Args:
            samples: how many were learnt from, and how many judged.
            more: further facts.
        """
        refined = swaps.plan(self.keep)
        gone = refined.inside()
        never = gone & plan.inside()  # inside blocks that are gone, before and after
        moved = {
            name: {"back": int((keep & ~plan.keep[name]).sum()), "out": int((plan.keep[name] & ~keep).sum())}
            for name, keep in refined.keep.items()
            if name not in never
        }
        facts: dict[str, Any] = {
            "target": target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__),
            "samples": {"learn": samples[0], "accept": samples[1]},
            "before": {"learn": self.start[0], "accept": self.start[1]},
            "after": {"learn": self.learn, "accept": self.accept},
            "changed": sum(each["back"] for each in moved.values()),
            "kept": sum(int(keep.sum()) for name, keep in refined.keep.items() if name not in gone),
            "ended": ended,
            "from": plan.digest,
            "options": dict(options),
            "history": self.history,
            **more,
        }
        if _parted(self.start, (self.learn, self.accept)):
            facts["note"] = (
                f"the mask fits the {samples[0]} samples it learnt from (divergence {self.learn:.3g}) much better than others "
                f"({self.accept:.3g}); more scoring samples would help"
            )
            warnings.warn(f"refine: {facts['note']}", stacklevel=3)
        facts["moved"] = moved
        return replace(refined, given=dict(plan.keep), provenance={**refined.provenance, "refine": facts})


def _parted(before: tuple[float, float], after: tuple[float, float]) -> bool:
    """Whether the divergences of both parts moved apart: an overfitted mask."""
    if min(*before, *after) <= 0:
        return False
    return after[1] / after[0] > PARTED * max(1.0, before[1] / before[0])
