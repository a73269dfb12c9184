"""When a search must stop: looked at between its steps, and each time that it runs the model.

Of several ranks the first one's clock counts, and all look at it together: between steps and before each pass over samples.
"""

from __future__ import annotations

import copy
import time

from torch import Tensor

from prunekit import ranks
from prunekit.kernel import ModelFunction


class OutOfTime(BaseException):
    """The deadline has passed. Like KeyboardInterrupt it is no error, so that nothing on the way takes it for one."""


class Deadline:
    """So many seconds from now; None is never.

    Args:
        seconds: 0 or more.
    """

    def __init__(self, seconds: float | None) -> None:
        self._begin, self._seconds = time.monotonic(), seconds
        self._end = None if seconds is None else self._begin + seconds

    @property
    def share(self) -> float:
        """Of the time that has gone by, from 0 to 1; 0 where there is no end."""
        if self._seconds is None:
            return 0.0
        seconds = self._seconds
        return ranks.from_first(lambda: min(1.0, (time.monotonic() - self._begin) / max(seconds, 1e-9)))

    @property
    def passed(self) -> bool:
        if self._end is None:
            return False
        end = self._end
        return ranks.from_first(lambda: time.monotonic() > end)

    def look(self) -> None:
        """Raises OutOfTime once it has passed."""
        if self.passed:
            raise OutOfTime

    def watched(self, function: ModelFunction) -> ModelFunction:
        """The same function, whose every evaluation after the deadline raises ``OutOfTime``; the model is shared.

        A pass over samples (per-sample gradients, the nodes of blame) is many evaluations, so that it is left at the next one,
        not at its end. Of several ranks each evaluates as often as it has samples, so they leave at the next pass
        (``Objective.watched``).
        """
        if ranks.size() > 1:
            return function
        other, whole = copy.copy(function), function.target

        def target(outputs: Tensor, labels: Tensor) -> Tensor:
            self.look()
            return whole(outputs, labels)

        other.target = target
        return other
