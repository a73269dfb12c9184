"""Every structure from the command line: planned, cut, measured, compared; what makes no sense is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
from prunekit.data import digits
from prunekit.models import digits_transformer
from tests.cli.conftest import Cli, whole_run

RECIPE = """
seed: 3
threads: 1
model: {factory: "prunekit.models:digits_transformer", args: {width: 8, layers: 1, heads: 4, kv_heads: 2, hidden: 12}}
data: {factory: "prunekit.data:digits", args: {}}
train: {optimizer: {name: adamw, lr: 0.01, weight_decay: 0.05}, epochs: 1, batch_size: 128}
prunable: {ignore: [positions, classifier.weight]}
score: {samples: 12, criteria: [influence, magnitude, random]}
compare: {allocations: [global, uniform], structures: [channels, heads, layers, "2:4", "block:4x2"], sparsities: [0.2, 0.5]}
prune:
  - {name: neurons, sparsity: 0.4, structure: channels, refine: {when: better, rounds: 2, learn: false, samples: 64}}
  - {name: heads, sparsity: 0.15, structure: heads, criterion: influence}
  - {name: layers, sparsity: 0.5, structure: layers, refine: {when: better, rounds: 2, learn: false, samples: 64}}
  - {name: nm, structure: "2:4", refine: {when: better, rounds: 2, learn: false, samples: 64}}
  - {name: tiles, sparsity: 0.3, structure: "block:4x2", refine: {when: better, rounds: 2, learn: false, samples: 64}}
eval: {samples: 1, nodes: 1, latency_batches: [1]}
"""


def build() -> torch.nn.Module:
    return digits_transformer(width=8, layers=1, heads=4, kv_heads=2, hidden=12)


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a small transformer, made by ``prunekit run``."""
    return whole_run(RECIPE, "attentive", tmp_path_factory)


def test_a_run_cuts_and_measures_every_structure(attentive: Path) -> None:
    x, y = digits()["test"]
    for name in ("neurons", "heads", "layers", "nm", "tiles"):
        folder = attentive / "pruned" / name
        model = prunekit.load(folder, build)
        found = json.loads((folder / "eval.json").read_text())
        with torch.no_grad():
            assert found["pruned"]["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
        assert found["pruned"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert (folder / "masks.safetensors").exists() == (name in ("nm", "tiles"))
        fewer = found["pruned"]["macs"] < found["dense"]["macs"]
        assert fewer == (name in ("neurons", "heads", "layers"))
    for name, mask in load_file(attentive / "pruned" / "nm" / "masks.safetensors").items():
        assert (mask.flatten(1).view(len(mask), -1, 4).sum(-1) == 2).all(), name


def test_comparison_has_one_cell_for_a_pattern_that_says_its_share(attentive: Path) -> None:
    cells = json.loads((attentive / "compare.json").read_text())["cells"]
    count = {s: sum(c["structure"] == s for c in cells) for s in ("channels", "heads", "layers", "2:4", "block:4x2")}
    assert count == {"channels": 12, "heads": 12, "layers": 12, "2:4": 3, "block:4x2": 12}
    assert all(c["achieved"] == 0.5 for c in cells if c["structure"] == "2:4")


def test_prune_names_what_it_left_whole(attentive: Path, cli: Cli) -> None:
    done = cli("prune", attentive, "-c", "magnitude", "-s", "0.3", "--structure", "channels", "--name", "again", "--dry-run")
    assert done.code == 0
    assert "left whole: " in done.out
    assert "is a LayerNorm" in done.out
    done = cli("prune", attentive, "-c", "magnitude", "--structure", "1:4", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert (result["name"], result["asked"], result["achieved"]) == ("1-4-0.75", 0.75, 0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--structure", "3:2"], "structure '3:2': N:M keeps N of every M weights"),
        (["--structure", "2:4", "-s", "0.7"], "sparsity is 0.7; 2:4 removes 0.5"),
        (["--structure", "2:4", "--allocation", "lamp"], "leave allocation out"),
        (["-s", "0.5", "--schedule", "iterative", "--every", "5", "--finetune", "1"], "--every is about"),
        (["--structure", "heads"], "prune needs --sparsity"),
        (["--structure", "head", "-s", "0.5"], "did you mean heads"),
        (["--structure", "heads+layer", "-s", "0.5"], "'layer' cannot be joined; did you mean layers"),
        (["--structure", "heads+2:4", "-s", "0.5"], "2:4 masks single weights and can be joined with nothing"),
    ],
)
def test_wrong_use_is_one_line(attentive: Path, cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("prune", attentive, "-c", "magnitude", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_model_without_heads_is_told_so(run: Path, cli: Cli) -> None:
    done = cli("prune", run, "-c", "magnitude", "-s", "0.5", "--structure", "heads")
    assert done.code == 1
    assert "heads: no attention was found" in done.err
    assert done.err.count("\n") == 1


def test_an_attention_is_named_when_a_model_is_imported(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.two, self.three, self.back = (nn.Linear(8, 8) for _ in range(4))\n"
        "        self.last = nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.one, self.two, self.three))\n"
        "        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)\n"
        "        return self.last(self.back(found.transpose(1, 2).flatten(2)).mean(1))\n"
        "def build(): return Net()\n"
        "def data():\n"
        "    x = torch.randn(80, 5, 8, generator=torch.Generator().manual_seed(0))\n"
        "    parts = zip(('train', 'validation', 'test', 'scoring'), x.split(20))\n"
        "    return {name: (part, part[:, 0, :3].argmax(1)) for name, part in parts}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import named  # type: ignore[import-not-found]

    save_file(named.build().state_dict(), "m.safetensors")
    done = cli("import", "--model", "named:build", "--weights", "m.safetensors", "--data", "named:data", "--out", "r",
               "--attention", '{"q": "one", "k": "two", "v": "three", "o": "back", "heads": 2}')  # fmt: skip
    assert done.code == 0, done.err
    assert cli("score", "r", "-c", "magnitude").code == 0
    done = cli("prune", "r", "-c", "magnitude", "-s", "0.3", "--structure", "heads", "--name", "h")
    assert done.code == 0, done.err
    assert load_file("r/pruned/h/model.safetensors")["one.weight"].shape == (4, 8)
    done = cli("import", "--model", "named:build", "--weights", "m.safetensors", "--out", "other", "--attention", '{"q": "one"}')
    assert done.code == 2
    assert "structure.attention.0" in done.err
