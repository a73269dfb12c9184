"""Text: every token's share in a number, against plain derivatives; what is shown of it is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Recorder, Trajectory
from prunekit.data import as_splits
from prunekit.errors import UsageError
from prunekit.explain import PrunedPath, View, ask, explain_part, explain_sample, find_part
from prunekit.explain.tokens import Reading, reading
from prunekit.report.terminal.explaining import show_explanation
from prunekit.task import get_task
from prunekit.trajectory import Segment
from prunekit.verbs.explaining import explain_run
from prunekit.verbs.run_folder import Run
from tests.report.test_pictures import Shown

WORDS, LENGTH = 12, 6
HOSTILE = ["<script>alert(1)</script>", "\x1b[31mred", "line\n", "\u202eturned", "&amp;", "'\"", *"abcdef"]


class Reader(nn.Module):
    """The mean of all tokens so far, through one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(WORDS, 6), nn.Linear(6, 8), nn.Linear(8, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        before = self.embed(tokens).cumsum(1) / torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        logits: Tensor = self.out(self.hidden(before).tanh())
        return logits


def build() -> nn.Module:
    torch.manual_seed(3)
    return Reader().double()


REFERENCE = build()


def decode(tokens: Sequence[int]) -> list[str]:
    return [HOSTILE[token] for token in tokens]


def data() -> dict[str, Any]:
    found: dict[str, Any] = {"decode": decode}
    for seed, name in enumerate(("train", "validation", "test", "scoring")):
        stream = torch.randint(WORDS, (8, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
        found[name] = (stream[:, :-1].clone(), stream[:, 1:].clone())
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, model = tmp_path_factory.mktemp("text"), build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    x, y = data()["train"]
    with Recorder(folder / "trajectory", model, optimizer, second_moments=True) as recorder:
        for step in range(6):
            indices = torch.arange(step, step + 4) % len(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]).movedim(-1, 1), y[indices]).backward()
            recorder.batch(indices)
            optimizer.step()
    factories: dict[str, Any] = {"model": f"{__name__}:build", "data": f"{__name__}:data"}
    return Run.from_recording(folder / "run", folder / "trajectory", **factories, task="causal_lm", eval={"samples": 4})


def log_probs(state: Tensor, trajectory: Trajectory, x: Tensor, y: Tensor) -> Tensor:
    """``(samples, places)``, by torch alone."""
    out = torch.func.functional_call(REFERENCE, dict(trajectory.layout.views(state)), (x,))
    return out.log_softmax(-1).gather(-1, y[..., None])[..., 0]


@pytest.mark.parametrize("target", [None, "log_prob"])
def test_tokens_add_up_to_what_is_explained_and_are_plain_derivatives(run: Run, target: str | None) -> None:
    path = run.trajectory
    x, y = (part.clone() for part in data()["test"])
    end = path.state(-1)
    pruned = end * (torch.arange(len(end)) % 3 > 0)
    jump = Segment(len(path), end, pruned, pruned - end, jump=True)
    view = ask(View.of(run.model, path, x[:5], y[:5], task=run.task), target, 1)
    paths = [PrunedPath("small", pruned == end, {}, (jump,), pruned)]
    found = explain_sample(view, 0, "test", None, paths)
    rows = found["tokens"]["samples"][0]["rows"]
    assert [row["token"] for row in rows] == [int(x[0, 0]), *y[0].tolist()]
    assert rows[0]["gave"] is None
    rows = rows[1:]

    expected = torch.zeros(LENGTH, dtype=torch.float64)
    for segment in path.segments():
        middle = (segment.start + segment.end) / 2
        one = torch.func.jvp(lambda s: log_probs(s, path, x[:1], y[:1]), (middle,), (segment.update,))[1]
        expected += one[0]
    torch.testing.assert_close(torch.tensor([row["gave"] for row in rows], dtype=torch.float64), expected, atol=1e-10, rtol=1e-8)
    last, cut = (log_probs(state, path, x, y) for state in (end, pruned))
    assert [row["model"] for row in rows] == pytest.approx(last[0].tolist())
    assert [row["pruned"]["small"] for row in rows] == pytest.approx((cut - last)[0].tolist())
    whole = float(last[0].sum() if target else -last[0].mean() + last[1:5].mean())
    assert found["contribution"]["model"] == pytest.approx(whole)
    if target:
        assert found["contribution"]["both"] == pytest.approx(float(expected.sum()))


@pytest.mark.slow
def test_parts_give_to_tokens_what_adds_up_to_the_model_and_one_token_can_be_asked_for(run: Run) -> None:
    path = run.trajectory
    x, y = data()["test"]
    view = ask(View.of(run.model, path, x[:2], y[:2], task=run.task), "log_prob")
    given = torch.zeros(2, LENGTH, dtype=torch.float64)
    for name in ("embed", "hidden", "out"):
        part = explain_part(view, find_part("layer", name, "", path.layout, run.model, lambda: x[:1]))
        given += torch.tensor([[row["gave"] for row in one["rows"][1:]] for one in part["tokens"]["samples"]])
    whole = explain_sample(view, 0, "test")
    assert [row["gave"] for row in whole["tokens"]["samples"][0]["rows"][1:]] == pytest.approx(given[0].tolist())
    one = ask(View.of(run.model, path, x[:1], y[:1], task=run.task), position=3)
    assert explain_sample(one, 0, "test")["contribution"]["both"] == pytest.approx(float(given[0, 2]))


@pytest.mark.slow  # it draws three pages
def test_pages_and_terminal_show_text_escaped(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = explain_run(run, "sample", "1", position=2)
    page = Path(found["path"]).read_text()
    assert "script" not in Shown(page).tags
    assert "&lt;script&gt;" in page or not any(row["token"] == 0 for row in found["tokens"]["samples"][0]["rows"])
    x, y = data()["test"]
    shown = "".join(decode([int(x[1, 0]), *y[1].tolist()]))
    assert found["text"].replace("\\x1b", "\x1b").replace("\\u202e", "\u202e") == shown
    beginning = json.dumps(
        shown[len(decode([int(x[1, 0])])[0]) :].replace("\x1b", "\\x1b").replace("\u202e", "\\u202e"), ensure_ascii=False
    )
    assert found["label"] == beginning
    named = [row for side in ("raised", "lowered") for row in found["training"][side]]
    train = data()["train"]
    for row in named:
        text = "".join(decode([int(train[0][row["index"], 0]), *train[1][row["index"]].tolist()]))
        assert row["text"].replace("\\x1b", "\x1b").replace("\\u202e", "\u202e") == text
    assert sum(row["score"] for row in named) == pytest.approx(found["training"]["sum"])
    capsys.readouterr()
    for result in (found, explain_run(run, "errors", limit=8), explain_run(run, "layer", "hidden", samples=[0, 3])):
        page = Path(result["path"]).read_text()
        show_explanation(result)
        for text in (page, capsys.readouterr().out):
            assert "\x1b" not in text
            assert "\u202e" not in text
        assert "script" not in Shown(page).tags
        assert 'class="passage"' in page


def test_positions_and_factories_are_refused_by_name(run: Run) -> None:
    for position, said in ((0, "not asked for that token, but for that at 1"), (7, "numbered 0 to 6")):
        with pytest.raises(UsageError, match=said):
            explain_run(run, "sample", "1", position=position)
    with pytest.raises(UsageError, match="--target is loss; of one token"):
        explain_run(run, "sample", "1", position=2, target="loss")
    assert all(split.decode is decode for split in run.splits.values())
    with pytest.raises(UsageError, match="decode is int"):
        as_splits(data() | {"decode": 7}, "mine:data")


X, MASK = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("task", "batch", "tokens", "places"),
    [
        ("causal_lm", (X, X + 1), [1, 2, 3, 4, 5], [None, 0, 1, 2, 3]),
        ("causal_lm", {"input_ids": X, "attention_mask": MASK}, [1, 2, 3], [None, 0, 1]),
        ("masked_lm", {"input_ids": X, "labels": torch.tensor([[-100, 7, -100, -100]])}, [1, 7, 3, 4], [None, 1, None, None]),
        ("seq2seq", {"input_ids": X, "labels": torch.tensor([[8, 9, -100, -100]])}, [1, 2, 3, 4, 8, 9], [*[None] * 4, 0, 1]),
        ("token_classification", {"input_ids": X, "labels": torch.tensor([[0, 1, -100, 1]])}, [1, 2, 3, 4], [0, 1, None, 3]),
        ("classification", {"input_ids": X, "attention_mask": MASK, "labels": torch.tensor([1])}, [1, 2, 3], [None] * 3),
    ],
)
def test_a_sample_is_read_as_its_task_asks(task: str, batch: Any, tokens: list[int], places: list[int | None]) -> None:
    kind = get_task(task)
    assert reading(kind, *kind.batch(batch)) == Reading(tokens, places)


def test_images_are_no_text() -> None:
    assert reading(get_task(None), torch.rand(1, 1, 4, 4), torch.tensor([0])) is None
