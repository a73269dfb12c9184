"""Figures of language models against plain float64 code, their errors against the definition, and what the protocol says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import UsageError
from prunekit.data import Samples, as_splits
from prunekit.task import evaluation as measuring
from prunekit.task import get_task
from prunekit.task.evaluation import Evaluation, References, evaluate
from prunekit.task.places import LanguageModel
from prunekit.task.protocol import paired, protocol

WORDS, LENGTH, BYTES = 30, 9, 3.25


class Words(nn.Module):
    """Logits of the next word from the word and the one before it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(WORDS, width), nn.Embedding(WORDS, width)
        self.out = nn.Linear(width, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.first(input_ids) + self.second(input_ids.roll(1, 1))))


@pytest.fixture
def windows() -> list[dict[str, Tensor]]:
    """Windows with padding and places that do not count; the last batch is smaller."""
    found = []
    for size in (17, 17, 6):
        ids = torch.randint(WORDS, (size, LENGTH))
        mask = (torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (size, 1))).long()
        labels = ids.masked_fill((mask == 0) | (torch.rand(size, LENGTH) < 0.2), -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def plain(dense: nn.Module, pruned: nn.Module, windows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By window sums over the tokens that count: nats of both models, KL, agreements, tokens; place by place in float64."""
    rows: list[list[float]] = []
    for batch in windows:
        with torch.no_grad():
            p, q = (m.double()(batch["input_ids"]).log_softmax(-1) for m in (dense, pruned))
        for ids, labels, a, b in zip(batch["input_ids"], batch["labels"], p, q, strict=True):
            row = [0.0] * 5
            for place in range(1, len(ids)):
                if labels[place] == -100:
                    continue
                at, there = int(labels[place]), place - 1
                row[0] -= float(a[there, at])
                row[1] -= float(b[there, at])
                row[2] += float((a[there].exp() * (a[there] - b[there])).sum())
                row[3] += float(a[there].argmax() == b[there].argmax())
                row[4] += 1
            rows.append(row)
    dense.float(), pruned.float()
    columns = torch.tensor(rows, dtype=torch.float64).t()
    return dict(zip(("dense", "pruned", "kl", "agreement", "tokens"), columns, strict=True))


def both(windows: list[dict[str, Tensor]], task: LanguageModel) -> tuple[Evaluation, Evaluation, dict[str, Tensor], Samples]:
    dense = Words()
    pruned = Words()
    pruned.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in dense.state_dict().items()})
    expected = plain(dense, pruned, windows)
    samples = Samples.of([dict(batch) for batch in windows], task.batch)
    return evaluate(dense, samples, task), evaluate(pruned, samples, task, References(dense, samples, task)), expected, samples


def causal(**options: Any) -> LanguageModel:
    found = get_task("causal_lm", **options)
    assert isinstance(found, LanguageModel)
    return found


def jackknife(figure: Any, rows: list[Tensor]) -> float:
    """The delete-one standard error of ``figure(*rows)``, window by window."""
    count = len(rows[0])
    without = [float(figure(*(torch.cat([r[:i], r[i + 1 :]]) for r in rows))) for i in range(count)]
    middle = sum(without) / count
    return math.sqrt((count - 1) / count * sum((each - middle) ** 2 for each in without))


def test_figures_and_paired_errors_are_those_of_plain_code(windows: list[dict[str, Tensor]]) -> None:
    task = causal(bytes_per_token=BYTES)
    dense, pruned, expected, _ = both(windows, task)
    tokens, nats = expected["tokens"], {name: expected[name] for name in ("dense", "pruned")}
    mean = {name: float(each.sum() / tokens.sum()) for name, each in nats.items()}
    for name, found in (("dense", dense), ("pruned", pruned)):
        figures = found.figures()
        assert figures["perplexity"] == pytest.approx(math.exp(mean[name]), rel=1e-5)
        assert figures["bits_per_byte"] == pytest.approx(mean[name] / math.log(2) / BYTES, rel=1e-5)
    figures = pruned.figures()
    assert figures["kl"] == pytest.approx(float(expected["kl"].sum() / tokens.sum()), rel=1e-4)
    assert figures["agreement"] == pytest.approx(float(expected["agreement"].sum() / tokens.sum()), rel=1e-6)

    found = paired(pruned, dense)
    assert found["windows"] == len(tokens)
    rows = [nats["pruned"], nats["dense"], tokens]
    by_hand = {
        "nats_per_token": lambda p, d, n: p.sum() / n.sum() - d.sum() / n.sum(),
        "perplexity": lambda p, d, n: (p.sum() / n.sum()).exp() - (d.sum() / n.sum()).exp(),
        "bits_per_byte": lambda p, d, n: (p.sum() - d.sum()) / n.sum() / math.log(2) / BYTES,
    }
    for name, figure in by_hand.items():
        told = found["differences"][name]
        assert told["difference"] == pytest.approx(float(figure(*rows)), rel=1e-3, abs=1e-6)
        assert told["standard_error"] == pytest.approx(jackknife(figure, rows), rel=1e-3)
    told = found["differences"]["kl"]
    assert "difference" not in told
    kl = jackknife(lambda each, n: each.sum() / n.sum(), [expected["kl"], tokens])
    assert told["standard_error"] == pytest.approx(kl, rel=1e-3)
    ratio, apart = found["perplexity_ratio"], found["differences"]["nats_per_token"]
    assert ratio["ratio"] == pytest.approx(math.exp(mean["pruned"] - mean["dense"]), rel=1e-4)
    assert math.log(ratio["high"] / ratio["low"]) == pytest.approx(2 * 1.96 * apart["standard_error"])


def test_the_jackknife_is_the_delta_methods_error_where_windows_are_many() -> None:
    task = causal()
    tokens = torch.randint(20, 60, (800, 1)).double()
    dense = tokens * (2 + 0.3 * torch.randn(800, 1).double())
    pruned = dense + tokens * (0.1 + 0.05 * torch.randn(800, 1).double())
    measure = task.measures[0]
    _, error = measure.lost(torch.cat([pruned, tokens], 1), torch.cat([dense, tokens], 1))
    means = {name: each.sum() / tokens.sum() for name, each in (("p", pruned), ("d", dense))}
    slopes = means["p"].exp() * (pruned - means["p"] * tokens) - means["d"].exp() * (dense - means["d"] * tokens)
    delta = float((slopes / tokens.mean()).std() / math.sqrt(800))
    assert error == pytest.approx(delta, rel=0.02)


def test_one_window_has_no_error(windows: list[dict[str, Tensor]]) -> None:
    task = causal()
    one = [{name: each[:1] for name, each in windows[0].items()}]
    dense, pruned, _, _ = both(one, task)
    found = paired(pruned, dense)
    assert all("standard_error" not in each for each in found["differences"].values())
    assert set(found["perplexity_ratio"]) == {"ratio"}


def test_pieces_and_smaller_batches_change_no_figure(windows: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    task, dense, pruned = causal(), Words(), Words()
    samples = Samples.of([dict(batch) for batch in windows], task.batch)
    whole = evaluate(pruned, samples, task, References(dense, samples, task))
    monkeypatch.setattr(measuring, "PIECE", 2 * LENGTH * WORDS)
    monkeypatch.setattr(measuring, "AT_ONCE", 5 * LENGTH * WORDS)
    assert max(len(group) for group in measuring.fitting(pruned, samples, task).groups) == 5
    parts = evaluate(pruned, samples, task, References(dense, samples, task))
    assert set(parts.rows) == {"perplexity", "bits_per_token", "accuracy", "agreement", "kl"}
    for name, rows in whole.rows.items():
        assert torch.allclose(parts.rows[name], rows, rtol=1e-5, atol=1e-6)


def test_half_precision_outputs_are_measured_in_single(windows: list[dict[str, Tensor]]) -> None:
    task = causal()
    outputs = (8 * torch.randn(4, LENGTH, WORDS)).bfloat16()
    labels = torch.randint(WORDS, (4, LENGTH))
    exact = -outputs.double().log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
    assert torch.allclose(task.measures[0].each(outputs, labels)[:, 0], exact, rtol=1e-5)


def test_the_protocol_counts_what_is_asked_for(windows: list[dict[str, Tensor]]) -> None:
    task = causal(bytes_per_token=BYTES)
    dense, _, expected, samples = both(windows, task)
    tokens = int(expected["tokens"].sum())
    found = protocol(task, "test", samples, dense, None)
    assert (found["windows"], found["length"], found["tokens"]) == (40, LENGTH, tokens)
    assert found["ignored"] == 40 * LENGTH - tokens
    assert found["bytes"] == round(BYTES * tokens)
    assert "stride" not in found
    assert "but its first" in found["asked"]
    assert "once" in protocol(task, "test", samples, dense, 4)["asked"]

    ids = torch.randint(WORDS, (8, LENGTH + 1))
    pairs = Samples.of([(ids[:, :-1], ids[:, 1:])], task.batch)
    plain_task = causal()
    found = protocol(plain_task, "test", pairs, evaluate(Words(), pairs, plain_task), LENGTH)
    assert (found["stride"], found["tokens"], found["ignored"]) == (LENGTH, 8 * LENGTH, 0)
    assert "its last one's too" in found["asked"]
    assert "bytes" not in found


def test_a_factory_says_its_stride() -> None:
    pair = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    every = dict.fromkeys(("train", "validation", "test", "scoring"), pair)
    assert as_splits({**every, "stride": 3}, "here")["test"].stride == 3
    assert as_splits(every, "here")["test"].stride is None
    with pytest.raises(UsageError, match="stride is 0; it must be a whole number of tokens above 0"):
        as_splits({**every, "stride": 0}, "here")
