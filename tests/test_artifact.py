"""JSON artifacts: every annotation is checked, older files still load, and errors name the file and the field."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

import pytest

from prunekit import checkpoint
from prunekit.apply import Manifest
from prunekit.artifact import SOMETIMES, Artifact
from prunekit.errors import ArtifactError
from prunekit.explain import EvaluationRecord, RemovalRecord, Timeline
from prunekit.explain.passages import passage
from prunekit.exporting import ExportRecord
from prunekit.reusing import first_difference
from prunekit.search import Comparison, Sensitivity
from prunekit.training.record import TrainingRecord

FIT = {"mean_error": 0.5, "max_error": 1, "mean_output": 2.0, "argmax_agreement": None}
CERTIFICATE = {"total": 0.1, "worst_step": 3, "worst": 0.01}
MODEL = {"accuracy": 0.5, "parameters": 4, "nonzero": 3, "macs": 8, "bytes": 16}
CLOSE = {"agreement": 1.0, "kl": 0.0}
BLAME = {"blame": 1.0, "layers": [{"layer": "a", "blame": 1.0}], "classes": [{"class": 3, "blame": 1.0}]}
MASK = {**BLAME, "divergence": 1.0, "residual": 0.0, "part": BLAME}
SOURCES = {"weights": "w", "trajectory": "t", "criterion": "c", "allocation": "global", "structure": "channels"}
PHASE = {"begin": 0, "end": 2, "kernel": 0.5, "regularisation": 0.0}
CELL = {"structure": "channels", "criterion": "c", "allocation": "global", "sparsity": 0.5, "repair": "", "achieved": 0.5,
        "achieved_all": 0.4}  # fmt: skip

MADE: list[Artifact] = [
    ExportRecord(
        to="onnx", made_from={"weights": "0"}, loads_with="it", files={"a": "0"}, tolerance=1e-4, difference=0.0, samples=[1, 5],
        notes=["n"], axes={"x": ["batch", 3]}, cost={"seconds": 0.1},
    ),
    TrainingRecord(
        steps=2, coordinates=3, losses=[1.0, 0.5], accuracies=[{"epoch": 1, "train": 0.5, "validation": 0.5}],
        accuracy={"train": 1.0, "validation": 0.5}, cost={"seconds": 0.1},
    ),
    EvaluationRecord(
        made_from=SOURCES, test_samples=8, sparsity={"prunable": 0.5, "all": 0.4}, dense=MODEL, pruned={**MODEL, **CLOSE},
        layers={"a": {"total": 4, "kept": 2}},
        latency={"machine": "m", "batches": {"1": {"dense_ms": 1.0, "pruned_ms": 0.5, "masked_ms": 0.7}}},
        kernel={
            "samples": 4, "dense": {**FIT, "certificate": CERTIFICATE},  # type: ignore[typeddict-item]
            "pruned": {**FIT, "by_layer": {"a": {"share": 1.0}}}, "masked_machine": FIT,  # type: ignore[typeddict-item]
        },
        masked={**MODEL, **CLOSE}, cost={"seconds": 0.1},
    ),
    Timeline(
        made_from={"trajectory": "t"}, samples_seen=1,
        layers={"rows": [{"layer": "a", "phases": [PHASE]}], "kernel": 0.5, "regularisation": 0.0,  # type: ignore[typeddict-item]
                "change": 0.5, "residual": 0.0},
        samples={"edges": [0, 2], "rows": [{"sample": 0, "label": 1, "answer": 1, "learned": None, "moved": [0.5]}]},
    ),
    RemovalRecord(
        made_from={"trajectory": "t"},
        told={"what": "pruned", "name": "n", "split": "scoring", "samples": 4, "nodes": 8, "structure": "channels",
              "before": MASK, "after": MASK, "refine": None, "refined_again": 0, "moved": {"back": 1, "out": 1},
              "units": [{"name": "a 1", "blame": 1.0, "samples": [{"index": 0, "label": 3, "blame": 1.0}]}]},
        pictures={"unit 0": [{"caption": "0", "png": "", "side": 8}], "unit 1": [passage("0", ["a"], [0.5])]},
        cost={"seconds": 0.1},
    ),
    Comparison(made_from={}, dense={"accuracy": 1.0}, cells=[{**CELL, "accuracy": 0.5, "agreement": 0.5, "kl": 1.0}], cost={}),
    Sensitivity(
        made_from={"criterion": "c", "structure": "channels", "sparsities": [0.5]}, dense={"accuracy": 1.0},
        cells=[{"layer": "a", "sparsity": 0.5, "removed": 2, "accuracy": 0.5}], cost={},
    ),
    Manifest("channels", {"a@0": [0, 2]}, {"a": {"out_channels": 2}}, {}, "p", {"request": {}}, {"sparsity": {}}),
]  # fmt: skip
NAMES = [type(made).__name__ for made in MADE]


@pytest.mark.parametrize("made", MADE, ids=NAMES)
def test_what_was_saved_comes_back(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    made.save(path)
    assert type(made).load(path) == made
    content = json.loads(path.read_text())
    assert list(content)[:2] == ["schema", "kind"]
    checkpoint.write_json(path, {**made.content(), "from a later day": 1})
    assert type(made).load(path) == made


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and mappings."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def refusal(kind: type[Artifact], path: Path) -> str | None:
    """What loading says, where it refuses."""
    try:
        kind.load(path)
    except ArtifactError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("made", MADE, ids=NAMES)
def test_values_of_another_type_are_refused_or_allowed_but_never_crash(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = json.loads(json.dumps(made.content()))
    for place in places(content)[1:]:
        for wrong in (None, "text", 3, 0.5, [], {}, [[]], True, math.nan):
            changed = json.loads(json.dumps(content))
            inside = changed
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = wrong
            path.write_text(json.dumps(changed))
            message = refusal(type(made), path)
            assert message is None or re.fullmatch(f"{re.escape(str(path))}: .*", message)


@pytest.mark.parametrize("made", MADE, ids=NAMES)
def test_missing_keys_and_newer_schemas_are_named(made: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ArtifactError, match=re.escape(f"{path}: no such file")):
        type(made).load(path)
    path.write_text(json.dumps({**made.content(), "schema": 2}))
    with pytest.raises(ArtifactError, match="its schema is 2, of a newer prunekit; this one reads 1"):
        type(made).load(path)
    for key in ("schema", *(f for f in made.content() if f in ("made_from", "structure", "steps"))):
        path.write_text(json.dumps({k: v for k, v in made.content().items() if k != key}))
        with pytest.raises(ArtifactError, match=f"not a whole {made.CALLED} .*{key}.*; make it again"):
            type(made).load(path)


class Inner(TypedDict):
    name: str
    size: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class Example(Artifact):
    KIND: ClassVar[str] = "example"
    CALLED: ClassVar[str] = "example"

    inner: dict[str, list[Inner]]
    way: Literal["up", "down"]
    note: str | None = field(default=None, metadata=SOMETIMES)
    share: float | None = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"a": [{"name": "n"}, {"name": 3}]}}, "inner.a[1].name is 3; it must be text"),
        ({"inner": {"a": [{"size": 3}]}}, "inner.a[0] has no 'name'"),
        ({"inner": {"a": [{"name": "n", "size": 1.5}]}}, "inner.a[0].size is 1.5; it must be a whole number"),
        ({"inner": []}, "inner is []; it must be a mapping"),
        ({"way": "left"}, "way is 'left'; it must be one of 'up', 'down'"),
        ({"share": True}, "share is True; it must be a number"),
        ({"note": 1}, "note is 1; it must be text"),
    ],
)
def test_the_innermost_field_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = Example(inner={"a": [{"name": "n", "size": 1}]}, way="up", share=1)
    whole.save(path)
    assert Example.load(path) == whole
    assert "note" not in json.loads(path.read_text())
    path.write_text(json.dumps({**whole.content(), **change}))
    with pytest.raises(ArtifactError, match=re.escape(f"{path}: not a whole example ({message}); make it again")):
        Example.load(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_what_is_no_number_of_json_is_refused(number: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema": 1, "kind": "example", "inner": {}, "way": "up", "share": 5}).replace("5", number))
    with pytest.raises(ArtifactError, match=r"is not JSON|larger than any number"):
        Example.load(path)


def test_files_that_are_older_than_a_field_load(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema": 1, "kind": "example", "inner": {}, "way": "down"}))
    assert Example.load(path) == Example(inner={}, way="down")


def test_the_first_difference_is_named_inside_lists_too() -> None:
    before = {"prune": [{"name": "small", "refine": True}], "seed": 0}
    assert first_difference(before, {"prune": [{"name": "small", "refine": False}], "seed": 1}) == (
        "prune.0.refine was True, is now False"
    )
    assert first_difference(before, {**before, "prune": []}) == f"prune was {before['prune']}, is now []"
    assert first_difference(before, before) is None
