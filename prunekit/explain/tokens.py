"""The tokens that a sample of text shows, the place of its labels that asks for each, and what moved every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from prunekit.batch import Inputs, Labels, size
from prunekit.errors import UsageError
from prunekit.task import CausalLM, MaskedLM, Places, Seq2SeqLM, Task

if TYPE_CHECKING:
    from prunekit.explain.path import PrunedPath
    from prunekit.explain.view import View


@dataclass(frozen=True)
class Reading:
    """A sample as text is read.

    Attributes:
        tokens: its tokens in their order, without padding; of a model that predicts tokens also those that it shall predict.
        places: of each, the place of the labels that asks for it or for its class; None where none does.
    """

    tokens: Sequence[int]
    places: Sequence[int | None]


class TokenRow(TypedDict):
    """A token of an account: what the model gives it and what moved that; None where no place asks for it."""

    token: int
    place: int | None
    model: float | None
    gave: float | None
    pruned: dict[str, float]


def token_numbers(inputs: Inputs) -> Tensor | None:
    """The tokens ``(samples, places)`` among a batch's inputs; None where they hold no text."""
    if isinstance(inputs, Mapping):
        inputs = inputs.get("input_ids", next(iter(inputs.values()), None))
    elif isinstance(inputs, tuple | list) and inputs:
        inputs = inputs[0]
    text = isinstance(inputs, Tensor) and inputs.dim() == 2 and inputs.dtype in (torch.int64, torch.int32)
    return inputs if text else None


def has_places(task: Task, labels: Labels) -> bool:
    """Whether every token has a label of its own: ``(samples, places)``."""
    return isinstance(task, Places) and isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def reading(task: Task, inputs: Inputs, labels: Labels, k: int = 0) -> Reading | None:
    """A batch's sample as text; None where it is none.

    A causal language model's text begins with a token that nothing asks for; one that answers has the question before the
    answer; of a masked one the right tokens stand in place of the masks.
    """
    numbers = token_numbers(inputs)
    if numbers is None:
        return None
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    mask = mask if isinstance(mask, Tensor) and mask.shape == numbers.shape else torch.ones_like(numbers)
    here = numbers[k].tolist()
    stands = [bool(one) for one in mask[k].tolist()]
    if not has_places(task, labels):
        return Reading([t for t, on in zip(here, stands, strict=True) if on], [None] * sum(stands))
    asked: list[int | None] = [None if one == task.ignore_index else one for one in labels[k].tolist()]  # type: ignore[attr-defined]
    if isinstance(task, Seq2SeqLM):
        answer = [(token, p) for p, token in enumerate(asked) if token is not None]
        before = [t for t, on in zip(here, stands, strict=True) if on]
        return Reading([*before, *(token for token, _ in answer)], [*[None] * len(before), *(p for _, p in answer)])
    if isinstance(task, CausalLM):
        tokens = [here[0]]
        places: list[int | None] = [None]
        for p, token in enumerate(asked):
            if token is not None or (p + 1 < len(here) and stands[p + 1]):
                tokens.append(here[p + 1] if token is None else token)
                places.append(None if asked[p] is None else p)
        return Reading(tokens, places)
    shown = [t if one is None or not isinstance(task, MaskedLM) else one for t, one in zip(here, asked, strict=False)]
    rows = [(t, None if asked[p] is None else p) for p, t in enumerate(shown) if stands[p]]
    return Reading([t for t, _ in rows], [p for _, p in rows])


def place_of(view: View, position: int, k: int) -> int:
    """The place that asks for a sample's token at ``position``, counted from 0 as its text is read.

    Raises:
        UsageError: there is no such token, or the model is not asked for it.
    """
    found = reading(view.task, view.x, view.y, k) if has_places(view.task, view.y) else None
    if found is None:
        raise UsageError(f"--position is {position}; the task {view.task.name} has no class for every token of a sample")
    if not 0 <= position < len(found.tokens):
        raise UsageError(f"--position is {position}; the sample's tokens are numbered 0 to {len(found.tokens) - 1}")
    place = found.places[position]
    if place is None:
        asked = [n for n, one in enumerate(found.places) if one is not None]
        near = min(asked, key=lambda n: abs(n - position), default=None)
        raise UsageError(
            f"--position is {position}; the model is not asked for that token"
            + ("" if near is None else f", but for that at {near}")
        )
    return place


def token_account(view: View, moved: Tensor, pruned: Sequence[PrunedPath] = (), most: int = 1) -> dict[str, Any] | None:
    """Of the view's first ``most`` samples every token: the model's value there, what ``moved`` it, and what prunings did.

    None where the view is not asked for a number that is a sum over tokens.

    Args:
        moved: ``(samples, places)``, such as all that training did, or what it did through a part.
    """
    if view.asked is None or not view.asked.by_place:
        return None
    values = view.values(view.trajectory.state(-1)).double()
    changes = {path.name: view.values(path.end).double() - values for path in pruned}
    samples = []
    for k in range(min(most, view.looked, size(view.x))):
        found = reading(view.task, view.x, view.y, k)
        if found is None:
            return None
        samples.append({"rows": [_row(t, p, k, values, moved, changes) for t, p in zip(found.tokens, found.places, strict=True)]})
    return {"of": view.asked.by_place, "samples": samples}


def _row(token: int, place: int | None, k: int, values: Tensor, moved: Tensor, changes: Mapping[str, Tensor]) -> TokenRow:
    if place is None:
        return {"token": token, "place": None, "model": None, "gave": None, "pruned": {}}
    return {
        "token": token, "place": place, "model": float(values[k, place]), "gave": float(moved[k, place]),
        "pruned": {name: float(change[k, place]) for name, change in changes.items()},
    }  # fmt: skip
