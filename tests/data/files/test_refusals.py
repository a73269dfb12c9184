"""Every mistake in data is one line that names the file, the line and the reason; broken rows can be left out and are counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from prunekit.data.files import read
from prunekit.errors import PrunekitError
from tests.data.files.conftest import Home, Write, reviews

ROWS = reviews(20)
LINES = [json.dumps(row) for row in ROWS]


@pytest.fixture(scope="module")
def bert(home: Home) -> Path:
    return home("bert", num_labels=2)


BROKEN = {
    "not JSON": ('{"text": "a", "label"', "line 4: not JSON (Expecting ':' delimiter, character 22)"),
    "a list": ("[1, 2]", "line 4: holds a list, not a mapping"),
    "NaN": ('{"text": "a", "label": NaN}', "line 4: not JSON (NaN is not JSON)"),
    "an empty text": ('{"text": " ", "label": "pos"}', "line 4: text is empty"),
    "a number for a text": ('{"text": 5, "label": "pos"}', "line 4: text is 5, no text"),
    "no label": ('{"text": "a"}', "line 4: lacks label"),
    "a label of null": ('{"text": "a", "label": null}', "line 4: label is empty"),
    "half a character": ('{"text": "\\ud800", "label": "pos"}', "line 4: text holds half a character"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_line_is_named_or_left_out_and_counted(bert: Path, write: Write, what: str) -> None:
    line, why = BROKEN[what]
    place = write("rows.jsonl", "\n".join([*LINES[:3], line, *LINES[3:]]) + "\n")
    with pytest.raises(PrunekitError) as refused:
        read(place, model=bert, task="classification")
    assert why in str(refused.value)
    assert str(place) in str(refused.value)
    assert "--skip-bad" in str(refused.value)
    splits = read(place, model=bert, task="classification", skip_bad=True)
    assert sum(map(len, splits.values())) == len(ROWS)
    assert f"left out 1 broken row: {place}: {why}" in splits["train"].notes[0]


FILES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "a quote that stays open": ("a.csv", 'text,label\ngood,1\n"bad,0\nx,1\n', {"skip_bad": True}, "line 3: a quote opens there"),
    "a row of too many fields": ("a.csv", "text,label\ngood,1\nbad,0,1\n", {}, "line 3: 3 fields, the heading has 2"),
    "bytes that are not UTF-8": ("a.csv", b"text,label\ncaf\xe9,1\n", {}, "line 2: not text in UTF-8"),
    "two columns of a name": ("a.csv", "text,text\na,b\n", {}, "two columns are called 'text'"),
    "broken rows alone": ("a.csv", b"text,label\ncaf\xe9,1\n", {"skip_bad": True}, "has no rows that can be read; "),
    "no token of a text": ("a.jsonl", ROWS, {"length": 2}, "the tokenizer puts 2 tokens around a text; it must be 3 at least"),
    "no bytes": ("a.jsonl", "", {}, "has no rows"),
    "a heading alone": ("a.csv", "text,label\n", {}, "has no rows"),
    "an unknown ending": ("a.xlsx", "", {}, "its ending '.xlsx' is unknown"),
    "no parquet": ("a.parquet", "PAR1", {}, "not a whole parquet file"),
    "half a JSON file": ("a.json", '[{"text": "a",\n"label": 1},', {}, "not JSON"),
    "a column that is not there": ("a.jsonl", ROWS, {"text": "txt"}, "has no column 'txt' (text); it has text, label"),
    "no column that is the text": (
        "a.jsonl", [{"a": "x", "b": "y", "label": 1}], {}, "no column's name says that it is the text; there are a, b, label",
    ),
    "two columns that could be": (
        "a.jsonl", [{"text": "x", "content": "y", "label": 1}], {}, "text and content could each be the text",
    ),
    "too few rows": (
        "a.jsonl", ROWS[:5], {}, "has 5 different inputs to make the splits train, validation, test, scoring of; at least 8",
    ),
    "too many classes": (
        "a.jsonl", [{"text": f"good {i}", "label": f"c{i % 3}"} for i in range(12)], {},
        "has 3 classes (c0, c1, c2), config.json has num_labels 2",
    ),
    "an index that is no class": (
        "a.jsonl", [{"text": f"good {i}", "label": i % 3} for i in range(12)], {},
        "labels go from 0 to 2, the model has 2 classes",
    ),
    "more tokens than positions": ("a.jsonl", ROWS, {"length": 64}, "length is 64 (--length), and the model has 32 positions"),
    "more scoring rows than there are": ("a.jsonl", ROWS, {"scoring": 30}, "are needed"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(bert: Path, write: Write, what: str) -> None:
    name, content, options, why = FILES[what]
    with pytest.raises(PrunekitError) as refused:
        read(write(name, content), model=bert, task="classification", **options)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_that_is_no_file_is_refused_and_not_waited_for(bert: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "inside").mkdir()
    os.mkfifo(tmp_path / "inside" / "train.csv")
    for place, why in ((tmp_path / "pipe.csv", "is a named pipe"), (tmp_path / "inside", "is a named pipe"),
                       (tmp_path / "none.csv", "no such file"), (Path("/dev/zero"), "is a device")):  # fmt: skip
        with pytest.raises(PrunekitError, match=why):
            read(place, model=bert, task="classification")


def test_a_hub_name_without_a_network_is_one_line(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*given: Any, **how: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(PrunekitError, match="somebody/reviews: no such file or folder here, and the Hugging Face hub cannot be"):
        read("somebody/reviews", model=bert, task="classification")


def test_a_table_of_pictures_names_none_outside_its_folder(bert: Path, write: Write) -> None:
    write("a.png", b"x", "pictures")
    place = write("metadata.csv", "file_name,label\n../../secret.png,1\n", "pictures")
    with pytest.raises(PrunekitError, match=r"line 2: file_name is '\.\./\.\./secret\.png'; it must name a file below"):
        read(place.parent, model=bert, task="classification")


def test_a_saved_data_set_names_no_file_elsewhere(bert: Path, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../elsewhere.arrow"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(PrunekitError, match=r"names the file '\.\./elsewhere\.arrow'"):
        read(folder, model=bert, task="classification")
