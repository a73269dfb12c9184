"""A run folder from a stranger runs nothing until its receiver says so; one's own runs are not asked about."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from prunekit import UsageError, checkpoint, trust
from prunekit.imports import load_object, use_working_folder
from prunekit.recipe import read_yaml
from prunekit.registry import offered
from prunekit.verbs.run_folder import Run
from tests.cli.conftest import Cli, with_recipe

VERBS = ("score", "compare", "prune", "eval", "sensitivity", "explain")
RAN = "touched"


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def data() -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    y = x[:, 0].gt(0).long()
    return {name: (x[i::4], y[i::4]) for i, name in enumerate(("train", "validation", "test", "scoring"))}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this user's, with a pruned model."""
    from tests.cli.conftest import whole_run

    return whole_run(OWN, "own", tmp_path_factory)


OWN = f"""
model: {{factory: "{__name__}:build"}}
data: {{factory: "{__name__}:data"}}
train: {{epochs: 1, batch_size: 6}}
score: {{criteria: [magnitude]}}
compare: {{structures: [unstructured], allocations: [global], sparsities: [0.5]}}
prune: [{{name: half, criterion: magnitude, sparsity: 0.5}}]
"""


def arguments(verb: str, run: Path) -> tuple[object, ...]:
    return {
        "score": ("score", run, "-c", "taylor"),
        "compare": ("compare", run),
        "prune": ("prune", run, "-c", "magnitude", "-s", 0.4),
        "eval": ("eval", run / "pruned" / "half", "--overwrite"),
        "sensitivity": ("sensitivity", run, "--sparsity", 0.5),
        "explain": ("explain", run, "layer", "0"),
    }[verb]


def gift(own: Path, tmp_path: Path, **changes: object) -> Path:
    """The run as a stranger would send it: its recipe changed."""
    run = tmp_path / "gift"
    shutil.copytree(own, run)
    with_recipe(run, **changes)
    return run


SENT = {
    "a shell": {"model": {"factory": "os:system", "args": {"command": f"touch {RAN}"}}},
    "a process": {"data": {"factory": "subprocess:check_output", "args": {"args": ["touch", RAN]}, "path": None}},
    "a file beside it": {"model": {"factory": "runpy:run_path", "args": {"path_name": "gift/evil.py"}}},
    "a module of the working folder": {"model": {"factory": "evil:build", "args": {}}},
    "a package that the folder is": {"loss": "gift.evil:build"},
    "a task": {"task": "evil:build"},
    "a module whose name is no identifier": {"loss": "1evil:build"},
    "a criterion inside another": {"score": {"criteria": ["tempered(evil:build)"]}},
    "a folder that no module can be": {"loss": "gift (1).evil:build"},
    "a pattern's spelling": {"score": {"target": "block:x4x1"}},
    "what built-in modules import": {"model": {"factory": "prunekit.models:nn.Linear", "args": {}}},
}


@pytest.mark.parametrize("what", SENT)
def test_what_a_stranger_sent_does_not_run(what: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = dict(SENT[what])
    if "score" in changes:
        changes["score"] = yaml.safe_load((own / "recipe.yaml").read_text())["score"] | changes["score"]
    run = gift(own, tmp_path, **changes)
    for name in ("evil.py", "1evil.py", "gift/evil.py"):
        (tmp_path / name).write_text(
            f"open({str(tmp_path / RAN)!r}, 'w')\ndef build(*a, **k): open({str(tmp_path / RAN)!r}, 'w')\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))  # as python -m and scripts have it
    with pytest.raises(UsageError, match="this run is not known as yours, and its recipe names code"):
        Run(run)
    assert not (tmp_path / RAN).exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_it_in_one_line(verb: str, own: Path, tmp_path: Path, cli: Cli) -> None:
    run = gift(own, tmp_path, **SENT["a shell"])
    done = cli(*arguments(verb, run))
    assert (done.code, done.out) == (2, "")
    assert "model.factory: os:system (frozen)" in done.err or "model.factory: os:system (" in done.err
    assert f"prunekit trust {run}" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_report_and_info_import_nothing_and_so_ask_nothing(own: Path, tmp_path: Path, cli: Cli) -> None:
    run = gift(own, tmp_path, **SENT["a shell"])
    assert cli("report", run).code == 0
    assert cli("info", run).code == 0


def test_several_runs_are_refused_for_the_one_that_came_from_elsewhere(own: Path, tmp_path: Path, cli: Cli) -> None:
    run = gift(own, tmp_path, **SENT["a shell"])
    done = cli("compare", own, run, "--out", tmp_path / "table")
    assert done.code == 2
    assert f"prunekit trust {run}" in done.err


def test_ones_own_runs_are_known_wherever_they_are_moved(own: Path, tmp_path: Path, cli: Cli) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(own, moved)
    Run(moved)
    assert cli("score", moved, "-c", "random", "-q").code == 0


def test_trust_shows_what_it_lets_run_and_asks(own: Path, tmp_path: Path, cli: Cli) -> None:
    run = gift(own, tmp_path, seed=77)  # another recipe, of the same code
    with pytest.raises(UsageError, match="not known as yours"):
        Run(run)
    asked = cli("trust", run)
    assert asked.code == 2
    assert "give --yes" in asked.err
    with pytest.raises(UsageError, match="not known as yours"):
        Run(run)
    done = cli("trust", run, "--yes")
    assert done.code == 0
    assert f"model.factory: {__name__}:build, from " in done.out
    Run(run)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("batch_size: 6", "batch_size: 7"))  # edited: ask again
    with pytest.raises(UsageError, match="not known as yours"):
        Run(run)


def test_another_module_of_the_same_name_is_not_what_was_trusted(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gift(own, tmp_path, model={"factory": "module_of_two_places:build", "args": {}})
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "module_of_two_places.py").write_text("def build(): ...\n")
    monkeypatch.syspath_prepend(str(mine))
    assert trust.remember(run, read_yaml(run / "recipe.yaml")) is None
    trust.check(run, read_yaml(run / "recipe.yaml"))
    monkeypatch.syspath_prepend(str(theirs))
    with pytest.raises(UsageError, match="not known as yours"):
        trust.check(run, read_yaml(run / "recipe.yaml"))


def test_built_in_factories_need_no_trust_and_marks_are_keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(
        'model: {factory: "prunekit.models:digits_cnn"}\ncompare: {structures: ["2:4", "block:4x1"]}\n'
    )
    assert trust.imports_of(read_yaml(tmp_path / "recipe.yaml")) == []
    (tmp_path / "recipe.yaml").write_text('model: {factory: "json:loads"}\n')
    for name in ("one", "other"):
        monkeypatch.setenv(trust.STATE, str(tmp_path / name))
        with pytest.raises(UsageError, match="not known as yours"):
            trust.check(tmp_path, read_yaml(tmp_path / "recipe.yaml"))
        assert trust.remember(tmp_path, read_yaml(tmp_path / "recipe.yaml")) is None
        trust.check(tmp_path, read_yaml(tmp_path / "recipe.yaml"))
        assert (tmp_path / name / "key").stat().st_mode & 0o077 == 0
    one, other = ({p.name for p in (tmp_path / name / "trusted").iterdir()} for name in ("one", "other"))
    assert not one & other  # another user's marks are worth nothing here


def test_where_nothing_can_be_kept_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text('model: {factory: "json:loads"}\n')
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trust.STATE, str(tmp_path / "file" / "state"))
    assert "set PRUNEKIT_STATE" in str(trust.remember(tmp_path, read_yaml(tmp_path / "recipe.yaml")))


def test_metadata_in_the_working_folder_offers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[prunekit.criteria]\nsneaky = evil:CRITERION\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    offered.cache_clear()
    try:
        assert "sneaky" not in {point.name for point in offered("prunekit.criteria")}
    finally:
        offered.cache_clear()


@pytest.mark.parametrize("key", ["target", "criterion"])
def test_a_score_file_names_no_code_either(key: str, own: Path, tmp_path: Path, cli: Cli) -> None:
    """Of a run whose recipe needs no trust, or has it."""
    from dataclasses import replace

    from prunekit.criteria import Scores, score_slug

    run = tmp_path / "run"
    shutil.copytree(own, run)
    assert cli("score", run, "-c", "taylor", "-q").code == 0
    (path,) = (run / "scores").glob("taylor*")
    scores = Scores.load(path)
    changed = replace(scores, provenance={**scores.provenance, key: "subprocess:check_output"})
    path.unlink()
    changed.save(run / "scores" / f"{score_slug(changed.criterion)}.safetensors")
    for verb in (("compare", run), ("prune", run, "-s", 0.4, "--schedule", "iterative", "--rounds", 2)):
        done = cli(*verb)
        assert done.code == 2, done.err
        assert "names code that neither you nor the run's recipe named here, subprocess:check_output" in done.err


def test_a_plan_file_names_no_code_either(own: Path, tmp_path: Path, cli: Cli) -> None:
    from dataclasses import replace

    from prunekit import Plan

    plan = Plan.load(own / "pruned" / "half" / "plan.safetensors")
    replace(plan, provenance={**plan.provenance, "criterion": "os:system"}).save(tmp_path / "plan.safetensors")
    done = cli("prune", own, "--apply", tmp_path / "plan.safetensors", "--name", "theirs")
    assert done.code == 2
    assert "names code that neither you nor the run's recipe named here, os:system" in done.err


def linear(evidence: object) -> dict[str, Tensor]:
    """A criterion of this user's."""
    return {name: tensor.abs() for name, tensor in evidence.weights().items() if name in evidence.prunable}  # type: ignore[attr-defined]


def test_what_this_user_named_on_the_command_line_may_stand_in_files(own: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    shutil.copytree(own, run)
    assert cli("score", run, "-c", f"{__name__}:linear", "-q").code == 0
    done = cli("prune", run, "-c", f"{__name__}:linear", "-s", 0.4, "--name", "mine")
    assert done.code == 0, done.err
    assert cli("eval", run / "pruned" / "mine", "-q").code == 0


def test_only_names_of_modules_are_ever_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``trust`` looks for is all that there is: other spellings are refused where they would be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("gift (1)", "1evil", "a+b", "block"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / RAN)!r}, 'w')\n")
        for path in (f"{name}:4x1", f"{name}:build.", f" {name}:build", f"{name}:a:b"):
            with pytest.raises(UsageError, match=r"it must look like package\.module:name"):
                load_object(path, "loss")
    assert not (tmp_path / RAN).exists()


def test_a_recordings_optimizer_is_no_import_path(own: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    shutil.copytree(own, run)
    path = run / "trajectory" / "trajectory.json"
    text = json.dumps(checkpoint.read_json(path))
    assert "torch.AdamW" in text
    checkpoint.write_json(path, json.loads(text.replace("torch.AdamW", "antigravity_of_theirs:Rule")))
    done = cli("score", run, "-c", "random", "-q")
    assert "antigravity_of_theirs" not in done.err
    assert done.code == 0


def test_parts_of_composed_scores_name_no_code(own: Path, tmp_path: Path, cli: Cli) -> None:
    from dataclasses import replace

    from prunekit.criteria import Scores

    run = tmp_path / "run"
    shutil.copytree(own, run)
    composed = "rank(magnitude)+rank(random)"
    assert cli("score", run, "-c", composed, "-q").code == 0
    (path,) = (run / "scores").glob("rank*")
    scores = Scores.load(path)
    first, *others = scores.parts
    evil = replace(first, provenance={**first.provenance, "target": "antigravity_of_theirs:x"})
    (tmp_path / "antigravity_of_theirs.py").write_text("")
    replace(scores, parts=(evil, *others)).save(path)
    sys.path.insert(0, str(tmp_path))
    try:
        done = cli("prune", run, "-c", composed, "-s", 0.4)
    finally:
        sys.path.remove(str(tmp_path))
    assert done.code == 2
    assert "names code that neither you nor the run's recipe named here" in done.err


def test_no_librarys_optional_import_ends_in_a_run_folder(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "module_nobody_has"
    shutil.copytree(own, run)
    (run / "__init__.py").write_text(f"open({str(tmp_path / RAN)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    use_working_folder(run)
    try:
        with pytest.raises(ModuleNotFoundError, match="lies in the run folder"):
            import module_nobody_has  # noqa: F401
    finally:
        use_working_folder()
    assert not (tmp_path / RAN).exists()


@pytest.mark.slow
def test_where_nothing_can_be_kept_ones_own_run_still_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trust.STATE, str(tmp_path / "file" / "state"))
    (tmp_path / "r.yaml").write_text(OWN)
    done = cli("run", tmp_path / "r.yaml", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "cannot be noted as yours" in done.err
