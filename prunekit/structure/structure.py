"""What a structure is: how the units are found that leave whole, and what is said of them. One file has one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunekit.errors import UsageError, theirs
from prunekit.structure.cut import Prober
from prunekit.structure.groups import Group, Groups

Mappings = Sequence[Mapping[str, Any] | str]
"""``[{q: <layer>, k: …, v: …, o: …, heads: 4, kv_heads: 2}]``: attention that its names do not give away.

``{qkv: <layer>, o: …, heads: 4}``: one layer whose outputs are all queries, then all keys, then all values. ``module:function``:
the user's own family of models, ``function(model)`` gives such mappings. ``{family: {q: …, k: …, v: …, o: …}}``: a row of
``prunekit.structure.families``, names as they are reached from one module.
"""


@dataclass(frozen=True)
class Structure:
    """Units that are taken out of the tensors. To add one, write a file with a ``STRUCTURE`` in ``units``.

    Attributes:
        find: ``(prober, attention) -> Groups``. The prober holds the model and its example inputs, and every group that is given
            back must have passed ``checked``.
        describes: one line for help texts and docs.
        nothing: what to say of a model that has none.
        sized: whether ``round_to`` and ``min_units`` are about it; ``counted``: they count its units, not the outputs they hold.
        part: what ``explain`` calls one of its units, such as ``channel``; None where it does not take one.
        holds: structures whose units are among its own, so that it is not joined with them.
    """

    find: Callable[[Prober, Mappings], Groups]
    describes: str
    nothing: str = "the model has no such units"
    sized: bool = False
    counted: bool = False
    part: str | None = None
    holds: tuple[str, ...] = ()


def checked(prober: Prober, groups: Sequence[Group], refused: Mapping[str, str]) -> tuple[list[Group], dict[str, str]]:
    """Those groups without whose units the model computes what it does with them masked; ``refused`` and the others, why."""
    faults = prober.faults(groups)
    return [group for group in groups if group.name not in faults], {**refused, **faults}


def as_structure(found: Any, name: str) -> Structure:
    """A user's ``Structure``, or a function ``(model, example_inputs) -> groups``, whose groups are checked like prunekit's own.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(found, Structure):
        inner = found.find
        return replace(found, find=lambda prober, attention: _groups(name, prober, lambda: inner(prober, attention)))
    if not callable(found) or isinstance(found, type):
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise UsageError(f"structure {name!r} is {kind}; it must be a Structure or a function (model, example_inputs) -> groups")
    said = (found.__doc__ or name).strip().partition("\n")[0]
    return Structure(lambda prober, attention: _groups(name, prober, lambda: found(prober.model, prober.inputs)), said)


def _groups(name: str, prober: Prober, find: Callable[[], Any]) -> Groups:
    """What a user's function finds, less what cannot be cut."""
    with prober.restoring(), theirs(f"structure {name!r}"):  # whatever it does to the model is undone
        found = find()
    groups = list(found) if isinstance(found, Sequence) else None
    if groups is None or not all(isinstance(group, Group) for group in groups):
        raise UsageError(f"structure {name!r} gave a {type(found).__name__}; it must give a list of prunekit.structure.Group")
    for group in groups:
        _check(name, group, prober.shapes)
    names = [group.name for group in groups]
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise UsageError(f"structure {name!r}: two groups are called {twice!r}")
    return Groups(*checked(prober, groups, getattr(found, "refused", {})))


def _check(name: str, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UsageError for a group whose members are not of the model."""
    if not group.members:
        raise UsageError(f"structure {name!r}: group {group.name!r} has no members")
    if "|" in group.name:
        raise UsageError(f"structure {name!r}: group {group.name!r} holds '|', which plans use as a separator")
    for member, where in group.members.items():
        tensor, _, axis = member.rpartition("@")
        said = f"structure {name!r}: {member!r} of group {group.name!r}"
        if tensor not in shapes or not axis.isdecimal() or int(axis) >= len(shapes[tensor]):
            raise UsageError(f"{said} is no <parameter>@<axis> of the model")
        if where.dim() != 2 or len(where) != group.size or not where.numel():
            raise UsageError(f"{said} has shape {tuple(where.shape)}; it must be ({group.size}, block)")
        most = shapes[tensor][int(axis)] - 1
        if where.is_floating_point() or not 0 <= int(where.min()) <= int(where.max()) <= most:
            raise UsageError(f"{said} must hold whole numbers from 0 to {most}")
