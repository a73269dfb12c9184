"""Windows of language models: every token counts once, bits a byte are of the text's bytes, masks stay the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.data import SPLITS
from prunekit.data.files import read
from prunekit.task import get_task
from prunekit.task.evaluation import evaluate
from tests.data.files.conftest import Home, Write, reviews

ROWS = [{"text": row["text"]} for row in reviews(40)]


@pytest.fixture(scope="module")
def llama(home: Home) -> Path:
    return home("llama", weights=True)


def _counted(split: Any) -> list[int]:
    """The tokens that are asked for, in order; labels are one place on."""
    _, labels = split.batch(range(len(split)))
    return [token for row in labels.tolist() for token in row if token != -100]


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 7), (32, 32)])
def test_windows_ask_for_every_token_once(llama: Path, write: Write, tokenizers: Any, length: int, stride: int) -> None:
    splits = read(write("rows.jsonl", ROWS), model=llama, length=length, stride=stride)
    for name in SPLITS:
        rows = splits[name].source
        texts = [rows.row(index)[0]["input"] for index in range(len(rows.places))]
        every = [token for text in texts for token in [*tokenizers["bytes"](text)["input_ids"], 0]]  # each ended by <eos>
        firsts = range(0, len(every), length) if stride == length else range(1)
        assert _counted(splits[name]) == [token for place, token in enumerate(every) if place not in firsts]
        assert rows.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / len(every))


def test_a_plain_text_is_kept_to_the_byte(llama: Path, write: Write, tokenizers: Any) -> None:
    text = "".join(f"{row['text']}\nßé {i}\n\n\n" for i, row in enumerate(ROWS))
    folder = write("train.txt", text).parent
    for name in ("validation", "test"):
        write(f"{name}.txt", f"{name}\n\n" + "".join(f"{name} {i} end\n\n" for i in range(9)))
    splits = read(folder, model=llama, length=16)
    parts = [splits[name].source for name in ("train", "scoring")]
    assert sum(part._bytes for part in parts if len(part.tokens)) == len(text.encode())
    test = splits["test"].source
    assert tokenizers["bytes"].decode(test.tokens.tolist()) == (folder / "test.txt").read_text()


def test_bits_a_byte_do_not_depend_on_the_tokenizer_and_are_each_splits_own(llama: Path, write: Write) -> None:
    import transformers

    splits = read(write("rows.jsonl", ROWS), model=llama, length=16, stride=8)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for name in ("validation", "test"):
        found = evaluate(model, splits[name].samples(), get_task("causal_lm", bytes_per_token=1)).figures()
        rows = splits[name].source
        nats = 0.0
        for index in range(len(rows)):  # plain torch, window by window
            item = {key: torch.as_tensor(value)[None] for key, value in rows[index].items()}
            with torch.no_grad():
                logits = model(input_ids=item["input_ids"], attention_mask=item["attention_mask"]).logits[:, :-1].double()
            nats += float(torch.nn.functional.cross_entropy(logits[0], item["labels"][0, 1:], reduction="sum"))
        counted = len(rows.tokens) - 1
        assert found["perplexity"] == pytest.approx(math.exp(nats / counted), rel=1e-4)
        per_byte = nats / math.log(2) / counted * len(rows.tokens) / rows._bytes
        assert found["bits_per_byte"] == pytest.approx(per_byte, rel=1e-4)


def test_masks_are_a_share_of_the_tokens_and_stay(home: Home, write: Write) -> None:
    place, model = write("rows.jsonl", ROWS), home("masked")
    splits = read(place, model=model, length=16)
    inputs, labels = splits["train"].batch(range(len(splits["train"])))
    again, _ = read(place, model=model, length=16)["train"].batch(range(len(splits["train"])))
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    asked = labels != -100
    inside = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != 2) & (inputs["input_ids"] != 3) | asked
    assert asked.any(1).all()
    assert not asked[:, 0].any()
    assert 0.08 < float(asked.sum() / inside.sum()) < 0.25
    shown = inputs["input_ids"][asked]
    assert 0.6 < float((shown == 4).float().mean()) < 0.95  # [MASK]
    other, _ = read(place, model=model, length=16, seed=1)["train"].batch([0])
    assert not torch.equal(other["input_ids"][0], inputs["input_ids"][0])


def test_answers_are_the_labels_and_padding_does_not_count(llama: Path, write: Write, tokenizers: Any) -> None:
    rows = [{"source": row["text"], "target": row["text"].upper()} for row in ROWS]
    splits = read(write("pairs.jsonl", rows), tokenizer=str(llama), task="seq2seq", length=24)
    inputs, labels = splits["test"].batch([0])
    assert torch.equal(inputs["labels"], labels)
    text = splits["test"].source.row(0)[0]["input"]
    assert labels[0][labels[0] != -100].tolist() == tokenizers["bytes"](text.upper())["input_ids"][:24]
    assert inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist() == tokenizers["bytes"](text)["input_ids"][:24]


def test_tokens_are_shown_as_text(llama: Path, write: Write) -> None:
    from prunekit.data.files import Options
    from prunekit.data.files.reading import read_files

    found = read_files(str(write("rows.jsonl", ROWS)), Options(), task="causal_lm", model=str(llama))
    tokens = found["train"].tokens[:9].tolist()
    assert "".join(found["decode"](tokens)).startswith(found["train"].row(0)[0]["input"][:6])
