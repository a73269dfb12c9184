"""A fast selection of the zoo: real kinds of models from checkpoint to explained, pruned model, with nothing but a factory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.zoo import reference, table
from benchmarks.zoo.cells import FAULT, REFUSED, WORKS, Wrong, command, judged
from benchmarks.zoo.entry import STEPS
from benchmarks.zoo.steps import counted, walk
from prunekit import PrunekitError, StructureError, UsageError
from tests.pictures import undrawn

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries; what a user must know is in what prunekit says

FAST = [name for name, entry in table.MODELS.items() if entry.fast]
# These cost more than all other steps together, and look at a model through what those have shown to work: each is asked
# of two or three kinds, and not of all.
DEAR = {
    "refine": ("hf_llama", "regression"),
    "eval": ("unet", "lstm_tagger", "vae"),
    "explain": ("hf_llama", "regression"),
}


LONG = ("hf_llama", "tv_resnet18", "unet")
"""Of those the ones that take longest: make exhaustive."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LONG)) for name in FAST])
def test_every_step_works_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    package = table.missing(name)
    if package is not None:
        pytest.skip(f"{name} needs {package}, which is not installed (pip install 'prunekit[test]')")
    steps = [step for step in STEPS if name in DEAR.get(step, FAST)]
    with undrawn():  # make zoo draws
        cells = walk(name, tmp_path, steps)
    assert list(cells) == steps
    faults = [f"{step}: {cell.why} {cell.where}" for step, cell in cells.items() if cell.verdict == FAULT]
    assert not faults, "\n".join(faults)
    refused = {
        step: cell.why for step, cell in cells.items() if counted(table.MODELS[name], step, cell) and cell.verdict == REFUSED
    }
    assert len(refused) <= 1, refused


@pytest.mark.parametrize("family", ["torchvision", "timm", "transformers", None])
def test_the_fast_selection_has_every_family(family: str | None) -> None:
    assert any(family in table.MODELS[name].packages if family else not table.MODELS[name].packages for name in FAST)


def test_the_fast_selection_has_every_step() -> None:
    assert set(STEPS) > set(DEAR)
    for step, names in DEAR.items():
        assert set(names) <= set(FAST), step


def _raises(error: Exception) -> str:
    raise error


def test_a_cell_tells_a_refusal_from_a_fault() -> None:
    assert judged(lambda: "50%").verdict == WORKS
    assert judged(lambda: _raises(StructureError("heads: no attention was found"))).verdict == REFUSED
    assert judged(lambda: _raises(UsageError("train.lr is -1; it must be > 0"))).verdict == REFUSED
    assert judged(lambda: _raises(PrunekitError("RuntimeError: mat1 and mat2 shapes"))).verdict == FAULT
    assert judged(lambda: _raises(PrunekitError("one line\nand another"))).verdict == FAULT
    assert judged(lambda: _raises(Wrong("parameters did not fall"))).verdict == FAULT
    assert judged(lambda: _raises(ZeroDivisionError("x"))).why == "ZeroDivisionError: x"


def test_a_command_that_refuses_raises_the_refusal(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        command("score", tmp_path, "-c", "magnitude")


def test_scores_are_compared_up_to_a_constant() -> None:
    found = torch.rand(50)
    assert reference.proportional(found, 3 * found) < 1e-6
    assert reference.proportional(found, found.flip(0)) > 0.1
