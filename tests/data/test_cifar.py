"""CIFAR-10's binary version, read from small archives of the same format that are made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prunekit import ArtifactError, UsageError
from prunekit.data import cifar2
from prunekit.data.cifar import TEST, TRAIN
from tests.cifar_archive import IMAGES, contents, pack, unpacked

MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def test_images_are_cats_and_dogs_in_order_normalised_by_channel(tmp_path: Path) -> None:
    files = contents()
    x, y = cifar2(str(pack(tmp_path / "any.tar.gz", files)), validation=3, scoring=3)["train"]
    expected, labels = [], []
    for name in TRAIN:
        for begin in range(0, len(files[name]), 3073):
            record = files[name][begin : begin + 3073]
            if record[0] not in (3, 5):
                continue
            labels.append(int(record[0] == 5))
            planes = [
                [(record[1 + 1024 * c + i] / 255 - mean) / deviation for i in range(1024)]
                for c, (mean, deviation) in enumerate(((0.4914, 0.2023), (0.4822, 0.1994), (0.4465, 0.201)))
            ]
            expected.append(planes)
    assert y.tolist() == labels
    torch.testing.assert_close(x.double(), torch.tensor(expected, dtype=torch.float64).view(-1, 3, 32, 32), atol=1e-6, rtol=1e-6)


def test_archive_folder_parent_and_environment_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = contents()
    (tmp_path / "a").mkdir()
    pack(tmp_path / "a" / "cifar-10-binary.tar.gz", files)
    unpacked(tmp_path / "b" / "cifar-10-batches-bin", files)
    monkeypatch.setenv("PRUNEKIT_DATA", str(tmp_path / "b"))
    places = ("a/cifar-10-binary.tar.gz", "a", "b/cifar-10-batches-bin")
    found = [cifar2(path, validation=4, scoring=5) for path in (*(str(tmp_path / place) for place in places), None)]
    for other in found[1:]:
        for name, (x, y) in other.items():
            assert x.equal(found[0][name][0])
            assert y.equal(found[0][name][1])


def test_test_images_are_dealt_out_once(tmp_path: Path) -> None:
    archive = str(pack(tmp_path / "a.tar.gz", contents()))
    splits = cifar2(archive, seed=2, validation=4, scoring=5)
    held = [tuple(image.flatten().tolist()) for name in ("validation", "scoring", "test") for image in splits[name][0]]
    assert [len(splits[name][0]) for name in ("validation", "scoring")] == [4, 5]
    other = cifar2(archive, seed=3, validation=4, scoring=5)
    again = [tuple(image.flatten().tolist()) for name in ("validation", "scoring", "test") for image in other[name][0]]
    assert len(set(held)) == len(held) == sum(label in (3, 5) for label in np.arange(IMAGES + 5) % 10)
    assert set(held) == set(again)
    assert held != again


def test_the_pickled_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "whole" / "cifar-10-batches-py").mkdir(parents=True)
    places = [
        pack(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b"\x80\x02}"}, "cifar-10-batches-py"),
        unpacked(tmp_path / "cifar-10-batches-py", {"data_batch_1": b"\x80\x02}"}),
        tmp_path / "whole",
    ]
    for place in places:
        with pytest.raises(UsageError, match=f"python version.*pickle runs whatever code.*{MD5}"):
            cifar2(str(place))


def test_without_a_path_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)
    with pytest.raises(UsageError, match=f"cs.toronto.edu.*{MD5}.*data.path.*PRUNEKIT_DATA"):
        cifar2()


def test_what_is_no_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = contents()
    bad_label = {**whole, TEST: b"\x0c" + whole[TEST][1:]}
    short = {**whole, TRAIN[1]: whole[TRAIN[1]][:-1]}
    lacking = {name: content for name, content in whole.items() if name != TRAIN[3]}
    cut = pack(tmp_path / "cut.tar.gz", whole)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "text.tar.gz").write_text("no archive")
    cases = {
        str(pack(tmp_path / "label.tar.gz", bad_label)): (ArtifactError, "test_batch.bin holds label 12"),
        str(pack(tmp_path / "short.tar.gz", short)): (ArtifactError, "data_batch_2.bin has .* not a whole number of images"),
        str(unpacked(tmp_path / "lacking", lacking)): (ArtifactError, "lacks data_batch_4.bin"),
        str(cut): (ArtifactError, "not a whole tar archive"),
        str(tmp_path / "text.tar.gz"): (ArtifactError, "not a whole tar archive"),
        str(tmp_path / "absent"): (UsageError, "no such file"),
    }
    (tmp_path / "empty").mkdir()
    cases[str(tmp_path / "empty")] = (UsageError, "holds no CIFAR-10")
    for path, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as caught:
            cifar2(path)
        assert "\n" not in str(caught.value)
        assert MD5 in str(caught.value)


def test_sizes_that_leave_no_test_images_are_refused(tmp_path: Path) -> None:
    archive = str(pack(tmp_path / "a.tar.gz", contents()))
    for sizes in ({"validation": 7, "scoring": 6}, {"validation": 0, "scoring": 1}):
        with pytest.raises(UsageError, match="leave test images"):
            cifar2(archive, **sizes)
