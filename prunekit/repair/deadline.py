"""When a search must stop: looked at between its steps, and each time that it runs the model."""

from __future__ import annotations

import copy
import time

from torch import Tensor

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
        return min(1.0, (time.monotonic() - self._begin) / self._seconds) if self._seconds else 0.0

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def watched(self, function: ModelFunction) -> ModelFunction:
        """The same function, whose every evaluation after the deadline raises ``OutOfTime``; the model is shared.

        A pass over samples (per-sample gradients, the nodes of blame) is many evaluations, so that it is left at the next one,
        not at its end.
        """
        other, whole = copy.copy(function), function.target

        def target(outputs: Tensor, labels: Tensor) -> Tensor:
            if self.passed:
                raise OutOfTime
            return whole(outputs, labels)

        other.target = target
        return other
