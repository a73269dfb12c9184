"""Files become the same samples whatever their kind; splits are disjoint, labels what they stand for."""

from __future__ import annotations

import csv
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunekit.data import SPLITS
from prunekit.data.files import read, table
from prunekit.errors import ArtifactError, UsageError
from tests.data.files.conftest import Home, Write, reviews

ROWS = reviews()


@pytest.fixture(scope="module")
def bert(home: Home) -> Path:
    return home("bert", num_labels=2, id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1})


def _texts(splits: dict[str, Any], name: str) -> list[str]:
    rows = splits[name].source
    return [rows.row(index)[0]["input"] for index in range(len(rows))]


def _table(rows: list[dict[str, Any]], separator: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.slow
def test_every_kind_of_file_gives_the_same_samples(bert: Path, write: Write, tmp_path: Path) -> None:
    import json

    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.to_parquet(str(tmp_path / "rows.parquet"))
    whole.save_to_disk(str(tmp_path / "saved"))
    places = [
        write("rows.jsonl", ROWS), write("rows.csv", _table(ROWS)), write("rows.tsv", _table(ROWS, "\t")),
        write("rows.json", json.dumps({"data": ROWS}, indent=1)), tmp_path / "rows.parquet", tmp_path / "saved",
    ]  # fmt: skip
    found = [read(place, model=bert, task="classification", length=16) for place in places]
    assert len({splits["train"].fingerprint for splits in found}) == 1
    first = found[0]["test"].batch(range(4))
    for splits in found[1:]:
        other = splits["test"].batch(range(4))
        assert all(torch.equal(first[0][name], other[0][name]) for name in first[0])
        assert torch.equal(first[1], other[1])
    assert set(first[0]) == {"input_ids", "token_type_ids", "attention_mask"}


def test_splits_are_disjoint_seeded_and_hold_every_text_once(bert: Path, write: Write) -> None:
    twice = [*ROWS, *ROWS[:20], {**ROWS[0], "label": "pos"}]
    place = write("rows.jsonl", twice)
    splits = read(place, model=bert, task="classification")
    texts = {name: _texts(splits, name) for name in SPLITS}
    for name in SPLITS:
        others = {text for other in SPLITS if other != name for text in texts[other]}
        assert not others & set(texts[name])
    assert sorted(text for name in SPLITS for text in texts[name]) == sorted(row["text"] for row in twice)
    assert all(torch.unique(splits[name].batch(range(len(splits[name])))[1]).numel() == 2 for name in SPLITS)
    again, other = (read(place, model=bert, task="classification", seed=seed) for seed in (0, 1))
    assert _texts(again, "test") == texts["test"] != _texts(other, "test")
    assert again["train"].digest() == splits["train"].digest() != other["train"].digest()


def test_given_splits_stay_and_lose_what_another_has(bert: Path, write: Write) -> None:
    write("train.csv", _table(ROWS[:40]), "given")
    write("test.csv", _table(ROWS[30:]), "given")
    folder = write("README.md", "about", "given").parent
    splits = read(folder, model=bert, task="classification")
    assert _texts(splits, "test") == [row["text"] for row in ROWS[30:]]
    made = [text for name in ("train", "validation", "scoring") for text in _texts(splits, name)]
    assert sorted(made) == sorted(row["text"] for row in ROWS[:30])
    assert "10 train rows are left out, because test has the same inputs" in "".join(splits["train"].notes)
    named = read({"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}, model=bert, task="classification")
    assert _texts(named, "test") == _texts(splits, "test")


def test_rows_that_all_have_one_label_are_told_of(bert: Path, write: Write) -> None:
    one, two = (
        read(write(name, rows), model=bert, task="classification")["train"].notes
        for name, rows in (("one.jsonl", [{**row, "label": "pos"} for row in ROWS]), ("two.jsonl", ROWS))
    )
    assert 'every row has the label "pos": no figure tells a model' in "".join(one)
    assert "every row" not in "".join(two)


def test_labels_go_by_the_config_or_else_by_the_alphabet(bert: Path, home: Home, write: Write) -> None:
    by_config = read(write("rows.jsonl", ROWS), model=bert, task="classification")
    assert by_config["test"].source.classes == ("pos", "neg")
    other = read(write("rows.jsonl", ROWS), model=home("bert", num_labels=2), task="classification")
    assert other["test"].source.classes == ("neg", "pos")
    assert "classes neg=0, pos=1 (in the order of the alphabet)" in "".join(other["train"].notes)
    labels = {name: splits["test"].batch(range(len(splits["test"])))[1] for name, splits in (("a", by_config), ("b", other))}
    assert torch.equal(labels["a"], 1 - labels["b"])
    upper = [{**row, "label": row["label"].upper()} for row in ROWS]
    assert read(write("upper.jsonl", upper), model=bert, task="classification")["test"].source.classes == ("POS", "NEG")
    half = [{**row, "label": {"pos": "pos", "neg": "bad"}[row["label"]]} for row in ROWS]
    with pytest.raises(UsageError, match=r"pos is class 1 of them but 0 of config\.json.s pos, neg; say their order in classes"):
        read(write("half.jsonl", half), model=bert, task="classification")
    indices = [{**row, "label": int(row["label"] == "pos")} for row in ROWS]
    assert read(write("indices.csv", _table(indices)), model=bert, task="classification")["test"].source.classes == ("pos", "neg")


def test_several_labels_numbers_and_pairs(home: Home, write: Write) -> None:
    three = home("bert", num_labels=3)
    several = [{"text": row["text"], "label": [["a"], ["c", "b"], []][i % 3]} for i, row in enumerate(ROWS)]
    labels = read(write("several.jsonl", several), model=three, task="multi_label")["train"].batch(range(12))[1]
    assert labels.dtype == torch.float32
    assert {tuple(row.tolist()) for row in labels} == {(1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0)}
    columns = [{"text": row["text"], "x": i % 2, "y": 1, "z": 0} for i, row in enumerate(ROWS)]
    splits = read(write("columns.csv", _table(columns)), model=three, task="multi_label", label=["x", "y", "z"])
    assert splits["test"].batch([0])[1][0, 1:].tolist() == [1.0, 0.0]
    numbers = [{"text": row["text"], "label": i / 7} for i, row in enumerate(ROWS)]
    found = read(write("numbers.csv", _table(numbers)), model=home("bert", num_labels=1), task="regression")
    assert found["test"].batch(range(3))[1].shape == (3, 1)
    pairs = [{"premise": row["text"], "hypothesis": "the end", "label": row["label"]} for row in ROWS]
    inputs = read(write("pairs.jsonl", pairs), model=home("bert", num_labels=2), task="classification")["test"].batch(range(3))[0]
    assert (inputs["token_type_ids"].sum(1) == 3).all()  # the end [SEP]


def test_tags_are_those_of_first_pieces(home: Home, write: Write) -> None:
    rows = [{"words": [*row["text"].split(), "films"], "tags": [*("BI" * 9)[: len(row["text"].split())], "O"]} for row in ROWS]
    splits = read(write("tags.jsonl", rows), model=home("tags", num_labels=3), task="token_classification", length=32)
    inputs, labels = splits["test"].batch([0])
    count = int(inputs["attention_mask"].sum())
    assert labels[0, 0] == -100  # [CLS]
    assert labels[0, 1 : count - 3].tolist() == [n % 2 for n in range(count - 4)]  # B, I, B, …
    assert labels[0, count - 3 :].tolist()[:3] == [2, -100, -100]  # film, ##s, [SEP]


def test_a_large_file_is_mapped_from_the_cache(bert: Path, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    place = write("rows.jsonl", "".join([*Path(write("a.jsonl", ROWS)).read_text(), "not JSON\n"]))
    small = read(place, model=bert, task="classification", skip_bad=True)
    monkeypatch.setattr(table, "IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for _ in range(2):  # made, then found
        large = read(place, model=bert, task="classification", skip_bad=True)
        assert large["test"].source.tables[0].data.cache_files
        assert large["train"].fingerprint == small["train"].fingerprint
        assert "left out 1 broken row" in large["train"].notes[0]


@pytest.mark.slow
def test_pictures_of_a_folder(home: Home, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    import transformers

    model = tmp_path / "vit"
    transformers.ViTConfig(num_labels=2, image_size=8, patch_size=4, architectures=["ViTForImageClassification"]).save_pretrained(
        model
    )
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(model)
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            image.fromarray(draw.integers(0, 255, (10, 12, 3), np.uint8)).save(tmp_path / "pictures" / name / f"{number}.png")
    splits = read(tmp_path / "pictures", model=model, task="classification")
    inputs, labels = splits["train"].batch(range(4))
    assert inputs["pixel_values"].shape == (4, 3, 8, 8)
    assert splits["train"].source.classes == ("cat", "dog")
    where = [splits["train"].source.row(index)[0]["input"] for index in range(4)]
    assert labels.tolist() == [int("dog" in place) for place in where]
    sizes = {name: len(splits[name]) for name in SPLITS}
    assert sum(sizes.values()) == 16
    (tmp_path / "pictures" / "cat" / "0.png").write_bytes(b"no picture")
    broken = read(tmp_path / "pictures", model=model, task="classification")
    (where,) = [name for name in SPLITS if any(text.endswith("cat/0.png") for text in _texts(broken, name))]
    with pytest.raises(ArtifactError, match=r"0\.png: not a whole picture"):
        broken[where].batch(range(len(broken[where])))


@pytest.mark.slow
def test_recordings_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    import transformers

    model = tmp_path / "wav"
    transformers.Wav2Vec2Config(num_labels=2, architectures=["Wav2Vec2ForSequenceClassification"]).save_pretrained(model)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=1000, do_normalize=False).save_pretrained(model)
    folder = tmp_path / "sounds"
    folder.mkdir()
    lines = ["file_name,label"]
    for number in range(12):
        samples = (8000 * np.sin(np.arange(1500) * (number + 1) / 90)).astype("<i2")
        with wave.open(str(folder / f"{number}.wav"), "wb") as out:
            out.setparams((1, 2, 2000, 0, "NONE", ""))
            out.writeframes(samples.tobytes())
        lines.append(f"{number}.wav,{['low', 'high'][number > 5]}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    splits = read(folder, model=model, task="classification", length=1)
    inputs, _ = splits["train"].batch(range(2))
    assert inputs["input_values"].shape == (2, 1000)  # a second at the extractor's rate
    assert (inputs["input_values"][:, 751:] == 0).all()  # 1,500 samples at 2,000 a second are 750 here
    assert inputs["input_values"][:, :700].abs().sum() > 0


def test_a_factorys_model_names_the_tokenizers_folder(bert: Path, write: Write) -> None:
    place = write("rows.jsonl", ROWS)
    splits = read(place, tokenizer=str(bert), task="classification")
    assert splits["test"].source.classes == ("neg", "pos")
    with pytest.raises(UsageError, match="say tokenizer"):
        read(place, task="classification")
    with pytest.raises(UsageError, match="no option 'txt'"):
        read(place, tokenizer=str(bert), txt="text")
