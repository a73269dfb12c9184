"""Tensors, torch programs, ONNX files: what is read back computes what was pruned, with other numbers of samples too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunekit
from prunekit import ArtifactError, UsageError, checkpoint
from prunekit.exporting import FORMATS, ExportRecord
from tests.export.conftest import pruned

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """Two inputs of different kinds, answers of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        states = torch.relu(self.mix(self.words(ids))) * scale[:, None, None]
        return {"each": self.out(states), "all": states.mean(1)}


def picture() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def two() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"ids": torch.randint(0, 11, (3, 5), generator=generator), "scale": torch.rand(3, generator=generator)}


def small(model: nn.Module, inputs: Any, structure: str = "channels") -> tuple[nn.Module, prunekit.Plan]:
    return pruned(model, inputs, structure, sparsity=0.4)


@pytest.mark.parametrize("structure", ["channels", "unstructured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_have_their_real_shapes_and_types_and_rebuild_the_model(
    structure: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, x = picture().to(dtype), X.to(dtype)
    found, plan = small(model, x, structure)
    record = prunekit.export(found, "state-dict", tmp_path / "out", x, plan=plan)
    assert record.difference == 0
    state = checkpoint.read_tensors(tmp_path / "out" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in found.state_dict().items()
    }
    back = prunekit.load(tmp_path / "out", lambda: picture().to(dtype))
    assert torch.equal(back(x), found(x))


def test_a_torch_program_needs_no_code_of_the_model_and_takes_any_number_of_samples(tmp_path: Path) -> None:
    found, plan = small(Small().eval(), two())
    record = prunekit.export(found, "torch-export", tmp_path / "out", two(), plan=plan)
    assert record.axes == {"ids": ["batch", "sequence"], "scale": ["batch"]}
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    ids, scale = torch.randint(0, 11, (9, 2)), torch.rand(9)
    expected = found(ids, scale)
    for now, before in zip(program(ids, scale), (expected["each"], expected["all"]), strict=True):
        torch.testing.assert_close(now, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_onnxruntime_computes_what_torch_does(tmp_path: Path) -> None:
    """Exporting takes torch a few seconds, whatever the model."""
    runtime = pytest.importorskip("onnxruntime")
    found, plan = small(Small().eval(), two())
    record = prunekit.export(found, "onnx", tmp_path / "out", two(), plan=plan)
    assert record.tolerance == 1e-4
    assert record.speed is not None
    assert record.speed["1"]["pruned_ms"] > 0
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {each.name: each.shape for each in session.get_inputs()} == {"ids": ["batch", "sequence"], "scale": ["batch"]}
    ids, scale = torch.randint(0, 11, (6, 3)), torch.rand(6)
    expected = found(ids, scale)
    answers = session.run(None, {"ids": ids.numpy(), "scale": scale.numpy()})
    for now, before in zip(answers, (expected["each"], expected["all"]), strict=True):
        torch.testing.assert_close(torch.from_numpy(now), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="bfloat16"):
        prunekit.export(found.bfloat16(), "onnx", tmp_path / "other", two())


class Deciding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > 0 else x[:, :2]


class Fixed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, -1))


@pytest.mark.parametrize(("model", "said"), [(Deciding(3, 2), "makes no program of Deciding"), (Fixed(3, 2), "4 samples alone")])
def test_code_that_is_no_program_is_refused_in_one_line(model: nn.Module, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        prunekit.export(model, "torch-export", tmp_path / "out", torch.rand(4, 3))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs {package}, which is not installed; pip install 'prunekit\[onnx\]'"):
        prunekit.export(nn.Linear(3, 2), "onnx", tmp_path / "out", torch.rand(4, 3))
    assert not list(tmp_path.iterdir())


def test_what_is_asked_for_without_what_it_needs_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    for to, said in (("onx", "did you mean onnx"), ("torch-export", "there are no data"), ("state-dict", "give it plan=")):
        with pytest.raises(UsageError, match=said):
            prunekit.export(model, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_stays_and_an_own_one_is_taken_again_or_replaced(tmp_path: Path) -> None:
    found, plan = small(picture(), X)
    out = tmp_path / "out"

    def again(overwrite: bool = False, to: str = "state-dict") -> ExportRecord:
        return prunekit.export(found, to, out, X, plan=plan, overwrite=overwrite)

    out.mkdir()  # an empty one is nobody's
    again()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ArtifactError, match=r"exists, made from other inputs \(to was 'state-dict', is now 'torch-export'\)"):
        again(to="torch-export")
    again(overwrite=True, to="torch-export")
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.pt2"]
    (out / "model.pt2").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="is not what the export wrote"):
        again(to="torch-export")
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds mine\.txt, which the export in it did not write"):
        again(overwrite=True)
    (out / "export.json").unlink()
    with pytest.raises(ArtifactError, match=r"and no export\.json"):
        again(overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is no folder"):
        prunekit.export(found, "state-dict", tmp_path / "file", X, plan=plan)


def test_a_folder_whose_answers_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                type(self).calls += 1
            return super().forward(x) + (1.0 if not torch.compiler.is_compiling() else 0.0)

    with pytest.raises(ArtifactError, match="nothing was written"):
        prunekit.export(Forgetful(3, 2), "torch-export", tmp_path / "out", torch.rand(4, 3))
    assert not list(tmp_path.iterdir())


def test_every_format_is_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    for name, each in FORMATS.items():
        assert f"`{name}`" in text
        assert each.about


def test_the_record_is_json_that_proves_itself(tmp_path: Path) -> None:
    found, plan = small(picture(), X)
    record = prunekit.export(found, "state-dict", tmp_path / "out", X, plan=plan)
    assert ExportRecord.load(tmp_path / "out" / "export.json") == record
    content = json.loads((tmp_path / "out" / "export.json").read_text())
    content["difference"] = 1.0
    (tmp_path / "out" / "export.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        ExportRecord.load(tmp_path / "out" / "export.json")
