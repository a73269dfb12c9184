"""When how much goes: schedules of pruning, and what does not go in several steps.

- ``one-shot``: all at once.
- ``iterative``: rounds of pruning and, if asked for, fine-tuning (Han et al. 2015, arXiv 1506.02626; with ``rewind`` the
  lottery ticket, Frankle & Carbin 2019, arXiv 1803.03635, and Frankle et al. 2020, arXiv 1903.01611).
- ``gradual``: while it fine-tunes, along a cubic (Zhu & Gupta 2017, arXiv 1710.01878).
"""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.errors import UsageError, nearest
from prunekit.structure import implied_sparsity

SCHEDULES = ("one-shot", "iterative", "gradual")
SPACINGS = ("geometric", "linear")


@dataclass(frozen=True)
class Schedule:
    """When how much goes.

    Attributes:
        name: a name from ``SCHEDULES``.
        rounds: of ``iterative``, and prunings of ``gradual``.
        spacing: ``geometric`` removes the same share of what is left in every round, ``linear`` the same number.
        every: optimizer steps between two prunings of ``gradual``; None spreads them over the first half of the steps.

    Example:
        >>> from prunekit import Schedule
        >>> [round(share, 3) for share in Schedule("iterative", rounds=3).sparsities(0.9)]
        [0.536, 0.785, 0.9]
    """

    name: str = "one-shot"
    rounds: int = 5
    spacing: str = "geometric"
    every: int | None = None

    def check(self, steps: int | None) -> None:
        """Raises UsageError for names or numbers that do not exist; ``steps``: of fine-tuning, None without."""
        if self.name not in SCHEDULES:
            raise UsageError(f"schedule {self.name!r} does not exist; {nearest(self.name, list(SCHEDULES))}")
        if self.spacing not in SPACINGS:
            raise UsageError(f"spacing {self.spacing!r} does not exist; {nearest(self.spacing, list(SPACINGS))}")
        if self.rounds < 1 or (self.every is not None and self.every < 1):
            raise UsageError(f"schedule: rounds is {self.rounds} and every is {self.every}; they must be 1 or more")
        if self.name == "gradual":
            if steps is None:
                raise UsageError("schedule gradual prunes while it fine-tunes; give finetune (--finetune EPOCHS)")
            last = self.rounds * self.spread(steps)
            if last > steps:
                raise UsageError(
                    f"schedule gradual would end at step {last}, fine-tuning after {steps}; lower rounds or every, or give "
                    "more epochs"
                )

    def spread(self, steps: int) -> int:
        """Steps between two prunings of ``gradual``."""
        return self.every or max(1, steps // (2 * self.rounds))

    def due(self, step: int, steps: int, sparsity: float) -> float | None:
        """The sparsity that ``gradual`` prunes to after ``step`` of ``steps`` optimizer steps; None where it does not prune."""
        number, between = divmod(step, self.spread(steps))
        return None if between or not 1 <= number <= self.rounds else cubic(sparsity, number, self.rounds)

    def sparsities(self, sparsity: float) -> list[float]:
        """Share of prunable parameters removed after each round; the last is ``sparsity``."""
        if self.name == "one-shot":
            return [sparsity]
        if self.name == "gradual":
            return [cubic(sparsity, j, self.rounds) for j in range(1, self.rounds + 1)]
        parts = [(r + 1) / self.rounds for r in range(self.rounds)]
        if self.spacing == "linear":
            return [sparsity * part for part in parts[:-1]] + [sparsity]
        return [1 - (1 - sparsity) ** part for part in parts[:-1]] + [sparsity]


def check_steps(structure: str, schedule: str) -> None:
    """Raises UsageError for a structure that cannot go in several prunings."""
    if schedule == "one-shot":
        return
    implied = implied_sparsity(structure)
    if implied is not None:
        raise UsageError(
            f"{structure} removes {implied:g} of every run at once, so there are no steps to take; leave schedule {schedule} out"
        )


def check_again(schedule: str, trains: bool, rewinds: bool) -> None:
    """Raises UsageError where nothing that was fine-tuned can be refined again."""
    if rewinds:
        raise UsageError("refining again goes on from fine-tuned weights, rewinding from early ones; leave one of them out")
    if schedule == "gradual":
        raise UsageError("refining again follows the last round of schedule one-shot or iterative, not gradual")
    if not trains:
        raise UsageError("refining again is for what was fine-tuned; give finetune (--finetune EPOCHS)")


def cubic(sparsity: float, pruning: int, prunings: int) -> float:
    """``s_f + (s_0 - s_f) (1 - j/n)³`` with ``s_0 = 0``: equation 1 of arXiv 1710.01878, after pruning ``j`` of ``n``."""
    return sparsity - sparsity * (1 - pruning / prunings) ** 3
