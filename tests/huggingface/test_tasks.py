"""What a model is for, as its class and config say it."""

from __future__ import annotations

from typing import Any

import pytest

from prunekit.errors import UsageError
from prunekit.huggingface import task_of
from prunekit.huggingface.tasks import ENDINGS, PROBLEMS
from prunekit.task import TASKS
from tests.huggingface.conftest import Save


@pytest.mark.parametrize(
    ("kind", "config", "task"),
    [
        ("bert", {}, None),  # three classes, or three labels: the data say it
        ("bert", {"problem_type": "single_label_classification"}, "classification"),
        ("bert", {"problem_type": "multi_label_classification"}, "multi_label"),
        ("bert", {"num_labels": 1}, "regression"),
        ("bert", {"problem_type": "regression"}, "regression"),
        ("vit", {}, None),
        ("tokens", {}, "token_classification"),
        ("masked", {}, "masked_lm"),
        ("llama", {}, "causal_lm"),
        ("gpt2", {}, "causal_lm"),
        ("t5", {}, "seq2seq"),
        ("base", {}, None),
    ],
)
def test_class_and_config_say_it(kind: str, config: dict[str, Any], task: str | None, save: Save) -> None:
    assert task_of(save(kind, config=config)) == task


def test_every_task_of_the_table_exists() -> None:
    assert {*ENDINGS.values(), *PROBLEMS.values()} <= set(TASKS.names())


def test_several_answers_need_a_task_with_a_loss(save: Save) -> None:
    folder = save("asked")
    with pytest.raises(UsageError, match=r'answers with start_logits and .*"heads": \["start_logits", "end_logits"\]'):
        task_of(folder)
    assert task_of(folder, labelled=False) is None
