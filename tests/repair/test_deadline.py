"""A budget of seconds holds: whatever a search is doing when it is over, the model runs no more than once again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunekit import Plan, make_plan, refine
from prunekit.kernel import ModelFunction
from prunekit.repair import deadline
from tests.repair.test_refine import trained
from tests.structure_models import IMAGES, random_scores


class Clock:
    """A second for every evaluation of a model function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(deadline.time, "monotonic", lambda: self.now)
        named = ModelFunction.named

        def counted(function: ModelFunction, *arguments: object) -> Tensor:
            self.now += 1
            return named(function, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(ModelFunction, "named", counted)


def started(plan: Plan, clock: Clock, *arguments: object) -> float:
    """How long the start-up takes."""
    refine(plan, *arguments, budget_seconds=0)  # type: ignore[arg-type]
    return clock.now


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "channels", "block:2x2"])
@pytest.mark.parametrize("learn", [True, False])
def test_a_budget_ends_a_search_within_an_evaluation(structure: str, learn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = trained("flattened")
    plan = make_plan(random_scores(model), model, IMAGES if structure == "channels" else None, sparsity=0.5, structure=structure)
    clock = Clock(monkeypatch)
    begin = started(plan, clock, model, batches)
    accepted = set()
    for more in (1, 3, 8, 21, 150):
        clock.now = 0.0
        refined = refine(plan, model, batches, budget_seconds=begin + more, learn=learn, steps=40)
        facts = refined.provenance["refine"]
        assert facts["ended"] == "budget"
        assert clock.now <= begin + more + 1
        assert facts["after"]["accept"] <= facts["before"]["accept"]
        assert facts["after"]["accept"] == min(entry["accept"] for entry in facts["history"])
        accepted.add(facts["after"]["accept"])
    assert len(accepted) > 1  # what was found in time is kept


def test_a_search_that_is_done_in_time_is_the_one_without_a_budget() -> None:
    model, batches = trained("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    free, timed = (refine(plan, model, batches, rounds=3, steps=10, budget_seconds=each) for each in (None, 1e6))
    assert timed.provenance["refine"]["ended"] == "done"
    assert all(torch.equal(free.keep[name], keep) for name, keep in timed.keep.items())
    assert free.history == timed.history


def test_a_budget_is_the_whole_commands_however_many_plans_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.verbs import refining

    now = [0.0]
    monkeypatch.setattr(refining.time, "monotonic", lambda: now[0])
    seconds = refining.Seconds(8.0, 20)
    given = []
    for _ in range(20):
        with seconds.share() as share:
            assert share is not None
            given.append(share)
            now[0] += share / 2 if len(given) == 1 else share  # the first one ends early: the others have more
    assert now[0] == pytest.approx(8.0)
    assert given[1] > given[0]
    with refining.Seconds(None, 3).share() as share:
        assert share is None
