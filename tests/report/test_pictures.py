"""Samples on a page: images that decode to what was shown, captions as text; ticks of a logarithmic axis are plain numbers."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from prunekit.explain.pictures import picture
from prunekit.report import write_explanation
from prunekit.report.plots import logarithmic


class Shown(HTMLParser):
    """Of every figure of a page: its caption, and the attributes of its image."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "figure":
            self.found.append(("", {}))
        elif tag == "img" and self.found and not self.found[-1][1]:
            self.found[-1] = ("", dict(attrs))
        self._inside = tag == "figcaption"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] = (self.found[-1][0] + data, self.found[-1][1])


def page_of(images: list[tuple[str, Tensor]], folder: Path) -> Shown:
    """A page of samples that changed their answer, with these pictures."""
    row = dict.fromkeys(("index", "label", "dense", "pruned"), 1) | {"groups": []}
    row |= dict.fromkeys(("margin_dense", "margin_pruned", "pruning", "training_since"), 0.5)
    changed = dict.fromkeys(("all", "right_to_wrong", "wrong_to_right", "wrong_to_wrong", "shown"), 1)
    result: dict[str, Any] = {
        "what": "diff", "title": "one against another", "samples": 1, "split": "test", "changed": changed, "layers": [],
        "accuracy": {"dense": 0.5, "pruned": 0.5}, "changes": [row], "groups": [{"name": "conv1 0", "blame": 1.0}],
        "certificate": dict.fromkeys(("mean_residual", "max_residual", "mean_change", "nodes"), 1),
        "cost": {"seconds": 0.0}, "made_from": {"trajectory": "t"},
    }  # fmt: skip
    write_explanation(folder / "page.html", result, {"changes": [picture(*one) for one in images]})
    return Shown((folder / "page.html").read_text())


def decoded(address: str | None) -> np.ndarray:
    """The pixels ``(height, width)`` or ``(height, width, 3)`` of a data address, in [0, 1]."""
    head, data = (address or "").split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) / 255


@pytest.mark.parametrize("size", [(1, 4, 4), (3, 4, 9), (1, 28, 28), (3, 128, 70)])
def test_pictures_decode_to_the_samples_and_captions_are_text(size: tuple[int, int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [(f"{k}: {k % 10}\n9 → {k}", 5 * torch.randn(size, generator=generator) - k) for k in range(15)]
    images.append(("<script>: \"&'\n</figure>", torch.randn(size, generator=generator, dtype=torch.float64)))
    images.append(("whole numbers", torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)))
    page = page_of(images, tmp_path)
    assert [caption for caption, _ in page.found] == [caption for caption, _ in images]
    assert not {"script", "link", "iframe"} & page.tags
    for (caption, image), (_, attributes) in zip(images, page.found, strict=True):
        values = image.double().numpy()
        expected = (values - values.min()) / (values.max() - values.min())
        pixels = decoded(attributes["src"])
        np.testing.assert_allclose(pixels, expected[0] if size[0] == 1 else expected.transpose(1, 2, 0), atol=1 / 255)
        assert caption.replace("\n", ", ") in (attributes["alt"] or "")
        assert (attributes.get("class") == "coarse") == (max(size) <= 64)  # enlarged on the page: its pixels stay squares


def test_photographs_are_kept_no_finer_than_a_page_shows_them(tmp_path: Path) -> None:
    ramp = torch.linspace(-3, 5, 1024).expand(3, 512, 1024)
    pixels = decoded(page_of([("1: 1", ramp)], tmp_path).found[0][1]["src"])
    assert pixels.shape == (64, 128, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to(((np.arange(128) + 0.5) / 128)[None, :, None], pixels.shape), atol=0.02)


def test_pictures_without_contrast_or_with_nan(tmp_path: Path) -> None:
    broken = torch.zeros(1, 4, 4)
    broken[0, 1, 1] = float("nan")
    flat, nan = page_of([("flat", torch.full((1, 4, 4), 7.0)), ("nan", broken)], tmp_path).found
    assert (decoded(flat[1]["src"]) == 0).all()
    assert (decoded(nan[1]["src"]) == 1).all()


@pytest.mark.parametrize("values", [(2.2, 2.3), (0.03, 0.9), (1e-9, 10.0), (2.1, 2.1)])
def test_ticks_of_a_logarithmic_axis_say_where_they_are(values: tuple[float, float]) -> None:
    figure = Figure()
    panel = figure.subplots()
    panel.plot([0, 1], values)
    logarithmic(panel)
    figure.draw_without_rendering()
    labels = [label for minor in (False, True) for label in panel.get_yticklabels(minor=minor) if label.get_text()]
    assert labels
    for label in labels:
        assert float(label.get_text()) == pytest.approx(label.get_position()[1], rel=1e-5)
