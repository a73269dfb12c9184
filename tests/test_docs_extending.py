"""What docs say of extending prunekit, run as it is written: a criterion, a structure and an optimizer rule of one's own."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prunekit import Recorder, Scores, Trajectory, UsageError
from prunekit.apply import Manifest
from prunekit.cli import main
from prunekit.criteria import score_slug
from prunekit.plan import Plan
from prunekit.trajectory.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("criteria", "structures", "kernel")}
FILES: dict[str, str] = {
    name: text for page in PAGES.values() for name, text in re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", page, re.S)
}
TINY = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def data():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    splits = {"train": (0, 60), "scoring": (40, 60), "validation": (60, 90), "test": (90, 120)}
    return {name: (x[a:b], y[a:b]) for name, (a, b) in splits.items()}
"""
RECIPE = """
model: {factory: "tiny:Tiny"}
data: {factory: "tiny:data"}
train: {epochs: 3, batch_size: 20, optimizer: {lr: 0.05}}
score: {criteria: ["moved:gap", "moved:FAR_AND_LARGE", magnitude], samples: 20}
compare: {structures: [unstructured, "pairs:pairs"], sparsities: [0.5], allocations: [global]}
prune: [{name: recipe, criterion: "moved:gap*magnitude", structure: "pairs:pairs", sparsity: 0.5, refine: false}]
eval: {samples: 10}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {**FILES, "tiny.py": TINY, "recipe.yaml": RECIPE}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in [*FILES, "tiny.py"]:  # another test's module of the same name
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["prunekit", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert (stop.value.code or 0) == code, said.err
        return said.err if code else said.out

    return run


def commands(page: str, section: str) -> list[list[str]]:
    """The lines of the first console block behind ``section``."""
    (lines,) = re.findall(r"```console\n(.*?)```", PAGES[page][PAGES[page].index(section) :], re.S)[:1]
    return [shlex.split(line.removeprefix("$ prunekit ").replace("RUN", "run")) for line in lines.splitlines()]


@pytest.mark.slow
def test_a_whole_run_by_a_criterion_and_a_structure_of_ones_own(here: Path, call: Callable[..., str]) -> None:
    call("run", "recipe.yaml", "--out", "run", "--quiet")
    manifest = Manifest.load(here / "run/pruned/recipe/prunekit.json")
    assert manifest.structure == "pairs:pairs"
    assert Plan.load(here / "run/pruned/recipe/plan.safetensors").provenance["criterion"] == "magnitude*moved:gap"
    for arguments in [
        *commands("criteria", "## A criterion of your own"),
        *commands("structures", "**A structure of your own**"),
    ]:
        call(*arguments, "--quiet")
    for name in ("moved:gap", "moved:FAR_AND_LARGE(group=l1)", "magnitude^0.5*moved:gap^0.5"):
        found = Scores.load(here / "run/scores" / f"{score_slug(name)}.safetensors")
        assert found.criterion == name
    first = Scores.load(here / "run/scores/moved...gap.safetensors")
    trajectory = Trajectory(here / "run/trajectory")
    start, end = (trajectory.layout.views(trajectory.state(i))["out.weight"] for i in (0, -1))
    assert torch.equal(first.importance["out.weight"], (end - start).abs())
    assert first.provenance["code"]["path"] == "moved:gap"
    assert "moved:gap" in call("info", "run")

    (here / "moved.py").write_text(FILES["moved.py"].replace("(now[name] - start[name]).abs()", "(now[name] - start[name]) ** 2"))
    sys.modules.pop("moved")
    assert "code.source was" in call("score", "run", "-c", "moved:gap", "--quiet", code=1)
    call("score", "run", "-c", "moved:gap", "--quiet", "--overwrite")
    again = Scores.load(here / "run/scores/moved...gap.safetensors")
    assert torch.equal(again.importance["out.weight"], (end - start) ** 2)


def test_a_recipe_is_refused_before_training_by_what_it_names(here: Path, call: Callable[..., str]) -> None:
    text = RECIPE.replace('"moved:gap*magnitude"', '"moved:gpa"')
    (here / "bad.yaml").write_text(text)
    said = call("run", "bad.yaml", "--out", "bad", "--quiet", code=2)
    assert "has no 'gpa'; did you mean gap?" in said
    assert not (here / "bad/trajectory").exists()


def test_the_rule_of_an_optimizer_that_prunekit_does_not_know(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero gradients: whatever moves the weights is decay, so the rule must explain the whole step."""
    torch.manual_seed(0)
    monkeypatch.setitem(RULES, "other", RULES["torch.SGD"])  # what is set below is taken back with it
    recorded = {}
    for known in (False, True):
        model = nn.Linear(5, 4).double()
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, weight_decay=0.3)

        def train(folder: str, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with Recorder(folder, model, optimizer, second_moments=True):
                for _ in range(5):
                    for p in model.parameters():
                        p.grad = torch.zeros_like(p)
                    optimizer.step()

        if not known:
            with pytest.raises(UsageError, match=r"torch\.RMSprop has none of .* \(it has square_avg, step\)"):
                train("unknown")
            (example,) = re.findall(r"<!-- python -->\n```python\n(.*?)```", PAGES["kernel"], re.S)
            exec(compile(example, "kernel.md", "exec"), {})
        else:
            train("known")
    try:
        recorded = Trajectory("known")
    finally:
        del RULES["torch.RMSprop"]
    assert recorded.rule_note == ""
    assert recorded.foreign_rules == {"torch.RMSprop": "rms:PlainRMSprop"}
    for segment in recorded.segments():
        assert segment.update.abs().max() > 1e-3
        torch.testing.assert_close(segment.data_update, torch.zeros_like(segment.update), atol=1e-12, rtol=0)
    later = Trajectory("known", rules={"torch.RMSprop": "rms:PlainRMSprop"})
    for one, other in zip(recorded.segments(), later.segments(), strict=True):
        assert torch.equal(one.regularisation, other.regularisation)
    assert "no rule for torch.RMSprop" in Trajectory("known").rule_note
    with pytest.raises(UsageError, match="must be a subclass of"):
        Trajectory("known", rules={"torch.RMSprop": "rms:LinearStep"})
