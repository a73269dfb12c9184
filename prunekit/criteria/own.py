"""A criterion of the user's own: what ``module:name`` or an entry point may name, and what is checked of what it computes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from prunekit import ranks
from prunekit.criteria.evidence import Criterion, CriterionResult, Evidence
from prunekit.criteria.group_scores import GROUPINGS
from prunekit.criteria.spec import OPTIONS
from prunekit.errors import UsageError, nearest, theirs


def as_criterion(found: Any, name: str) -> Criterion:
    """A ``Criterion``, its results checked, from one, or from a function of the evidence.

    The function gives a ``CriterionResult``, or ``{parameter: importance}``. It is taken to look at the scoring samples, and a
    group's importance to be the L2 norm of its weights'; write a ``Criterion`` to say otherwise.

    Raises:
        UsageError: it is neither, or names a grouping or an option that does not exist.
    """
    if isinstance(found, Criterion):
        criterion = found
    elif callable(found) and not inspect.isclass(found):
        said = (inspect.getdoc(found) or name).strip().partition("\n")[0]
        criterion = Criterion(found, said, needs_data=True)
    else:
        raise UsageError(f"criterion {name!r} is a {type(found).__name__}; it must be a Criterion or a function of the evidence")
    for what, value, known in (
        ("group", [criterion.group], GROUPINGS),
        ("accepts", criterion.accepts, OPTIONS),
        ("preset", criterion.preset, OPTIONS),
    ):
        for each in value:
            if each not in known:
                raise UsageError(f"criterion {name!r}: its {what} says {each!r}; {nearest(each, list(known))}")
    return replace(criterion, compute=_Checked(criterion.compute, name))


class _Checked:
    """A user's function. Its errors become one line, and its result is checked before it is used."""

    def __init__(self, compute: Callable[[Evidence], Any], name: str) -> None:
        self.compute, self.name = compute, name

    def __call__(self, evidence: Evidence) -> CriterionResult:
        with theirs(f"criterion {self.name!r}"), ranks.apart():  # it sees all samples on each rank
            found = self.compute(evidence)
        if isinstance(found, Mapping):
            found = CriterionResult(dict(found))
        if not isinstance(found, CriterionResult):
            raise UsageError(
                f"criterion {self.name!r} gave a {type(found).__name__}; it must give a CriterionResult, or a tensor by parameter"
            )
        weights = evidence.weights()
        for name in evidence.prunable:
            tensor = found.importance.get(name)
            if not isinstance(tensor, Tensor) or tensor.shape != weights[name].shape:
                was = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UsageError(
                    f"criterion {self.name!r}: the importance of {name} is {was}; its weights have {tuple(weights[name].shape)}"
                )
        kept = {name: found.importance[name].detach() for name in evidence.prunable}
        return replace(found, importance=kept)


def source(compute: Callable[..., Any]) -> str | None:
    """A short hash of the source of a user's function, so that another function of the same name is noticed; None without one."""
    while isinstance(compute, _Checked | partial):
        compute = compute.compute if isinstance(compute, _Checked) else compute.func
    try:
        text = inspect.getsource(inspect.unwrap(compute) if inspect.isroutine(compute) else type(compute))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:16]
