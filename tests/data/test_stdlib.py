"""Python's library as windows of tokens: each once, files of one split in no other, the same on every machine that has them."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunekit.data import as_splits, stdlib
from prunekit.data import stdlib as factory
from prunekit.errors import UsageError
from prunekit.models import llama

pytest.importorskip("tokenizers")
SIZES = {"train": 20, "validation": 3, "test": 3, "scoring": 5}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A library of 80 files, whose words say which file they are in."""
    root = tmp_path_factory.mktemp("lib")
    for n in range(80):
        place = root / ("tests" if n % 10 == 9 else "package") / f"m{n}.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text("\n".join(f"name{n}x = name{n}x + {k}  # é" for k in range(12)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: str(root))
        _forget()
        yield root
    _forget()


def _forget() -> None:
    import sys

    module = sys.modules[factory.__module__]
    module._texts.cache_clear()
    module._tokenizer.cache_clear()


def test_windows_follow_one_another_and_files_do_not_meet(library: Path) -> None:
    found = stdlib(length=16, vocabulary=300, **SIZES)
    words: dict[str, set[str]] = {}
    for name, split in as_splits(found, "stdlib").items():
        assert split.pair is not None
        x, y = split.pair
        assert tuple(x.shape) == (SIZES[name], 16)
        assert (x[:, 1:] == y[:, :-1]).all()
        text = "".join(found["decode"]([*x[:, 0].tolist(), *y.flatten().tolist()]))
        words[name] = {part.split("x")[0] for part in text.split("name")[1:] if "x" in part}
    assert words["train"] & words["scoring"]
    assert not words["test"] & words["validation"]
    assert not (words["train"] | words["scoring"]) & (words["test"] | words["validation"])
    assert not {f"{n}" for n in range(9, 80, 10)} & set().union(*words.values())  # tests are not read
    asked = found["test"][1]
    text = "".join(found["decode"](asked.flatten().tolist())).replace("<|end|>", "")
    assert found["bytes_per_token"] == pytest.approx(len(text.encode()) / asked.numel(), rel=0.02)  # windows may part a letter
    rows = [tuple(row) for name in ("train", "scoring") for row in found[name][1].tolist()]
    _forget()
    again = stdlib(length=16, vocabulary=300, **SIZES)
    assert all((again[name][0] == found[name][0]).all() for name in SIZES)
    assert len(rows) == SIZES["train"] + SIZES["scoring"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"train": 10**6}, "train and scoring 1000005: this Python's library has"),
        ({"test": 10**6}, "test 1000000: this Python's library has"),
        ({"length": 0}, "length 0.* must be at least 1"),
        ({"vocabulary": 256}, "vocabulary 256 at least 257"),
    ],
)
def test_what_cannot_be_had_is_refused(library: Path, asked: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        stdlib(**{"length": 16, "vocabulary": 300, **SIZES, **asked})


def test_a_library_without_text_is_refused(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _forget()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="0 files of source code"):
        stdlib(**SIZES)
    _forget()


def test_llama_is_refused_where_heads_do_not_fit() -> None:
    with pytest.raises(UsageError, match="width 10 must be a multiple of twice its 4 heads"):
        llama(width=10, heads=4, kv_heads=2)
