"""Every task in the table keeps the contract that the verbs stand on, and the docs name it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prunekit import TASKS, Task, UsageError
from prunekit.task import get_task

DOCS = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_it_says_what_is_explained_measured_and_chosen_by(name: str) -> None:
    task = get_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.target in task.targets()
    assert task.importance() in task.targets()
    assert callable(task.get_target(task.target))
    with pytest.raises(UsageError, match=r"does not exist|has no"):
        task.get_target("nonsense")
    json.dumps(task.facts())
    names = [measure.name for measure in (*task.measures, *task.closeness)]
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("name", TASKS)
def test_it_takes_a_batch_and_a_loss_of_the_users(name: str) -> None:
    task = get_task(name)
    x = y = torch.zeros(2, 3, dtype=torch.int64)
    inputs, _ = task.batch((x, y))
    assert inputs is x
    other = task.with_loss(lambda outputs, labels: outputs.sum())
    assert other is not task
    assert type(other) is type(task)
    assert other.facts() == task.facts()


@pytest.mark.parametrize("name", TASKS)
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"task {name}: has no option 'nonsense'"):
        get_task(name, nonsense=1)


@pytest.mark.parametrize("name", TASKS)
def test_it_stands_in_the_docs(name: str) -> None:
    assert f"\n| `{name}` |" in DOCS
