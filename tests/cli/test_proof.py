"""Every file proves itself: what was changed after it was written is noticed by the verbs that read it, and by info."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunekit import Trajectory, checkpoint
from prunekit.errors import ArtifactError, Note
from prunekit.recipe import RESOLVED
from prunekit.search import Comparison
from tests.cli.conftest import Cli


def tensors(path: Path, change: Callable[[dict], None]) -> None:
    """Changes tensors of a file as a person would who keeps its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = load_file(path)
    change(content)
    save_file(content, path, metadata=metadata)


def weights(run: Path) -> Path:
    path = run / "pruned" / "small" / "model.safetensors"
    tensors(path, lambda content: content["classifier.weight"].view(-1)[:16].mul_(1.01))
    return path


def mask_bits(run: Path) -> Path:
    path = run / "pruned" / "loose" / "masks.safetensors"

    def flip(content: dict) -> None:
        name = max(content, key=lambda name: content[name].numel())
        content[name].view(-1)[:200] ^= 1

    tensors(path, flip)
    return path


def score(run: Path) -> Path:
    path = run / "scores" / "magnitude.safetensors"
    tensors(path, lambda content: next(iter(content.values())).view(-1)[:1].mul_(2))
    return path


def finding(run: Path) -> Path:
    path = run / "scores" / "magnitude.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"seconds\\": ', b'\\"seconds\\":1', 1))
    assert path.read_bytes() != content
    return path


def number(name: str, old: str = '"accuracy": 0', new: str = '"accuracy": 1') -> Callable[[Path], Path]:
    def change(run: Path) -> Path:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))
        return run / name

    return change


def rate(run: Path) -> Path:
    path = run / "trajectory" / "steps.jsonl"
    lines = path.read_text().splitlines()
    step = json.loads(lines[4])
    step["groups"][0]["lr"] *= 1.5
    path.write_text("\n".join([*lines[:4], json.dumps(step), *lines[5:]]) + "\n")
    return path


def state(run: Path) -> Path:
    path = run / "trajectory" / "states-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    return path


CHANGES: list[tuple[Callable[[Path], Path], tuple[tuple[str, ...], ...]]] = [
    (weights, (("eval", "pruned/small"), ("report", ""), ("explain", "pruned/small"))),
    (mask_bits, (("eval", "pruned/loose"), ("report", ""))),
    (score, (("score", "", "-c", "magnitude"), ("prune", "", "-c", "magnitude", "-s", "0.3", "--name", "new"), ("report", ""))),
    (finding, (("score", "", "-c", "magnitude"), ("prune", "", "-s", "0.3", "--name", "new"))),
    (number("compare.json"), (("prune", "", "-s", "0.3", "--name", "new"), ("report", ""), ("compare", ""))),
    (number("pruned/small/eval.json"), (("report", ""), ("eval", "pruned/small"))),
    (number("train.json", '"steps": ', '"steps": 1'), (("report", ""),)),
    (number("timeline.json", '"kernel": ', '"kernel": 1'), (("report", ""),)),
    (number("pruned/small/prunekit.json", '"out_channels": ', '"out_channels": 1'), (("eval", "pruned/small"), ("report", ""))),
    (rate, (("score", "", "-c", "snip"), ("eval", "pruned/small"), ("prune", "", "-s", "0.3", "--name", "new"), ("report", ""))),
    (state, (("score", "", "-c", "snip"), ("eval", "pruned/small"), ("prune", "", "-s", "0.3", "--name", "new"))),
]  # fmt: skip
NAMES = [
    "weights",
    "mask bits",
    "score",
    "finding",
    "comparison",
    "evaluation",
    "training",
    "timeline",
    "manifest",
    "rate",
    "state",
]


@pytest.mark.parametrize(("change", "verbs"), CHANGES, ids=NAMES)
def test_what_was_changed_is_noticed(
    change: Callable[[Path], Path], verbs: tuple[tuple[str, ...], ...], run: Path, cli: Cli
) -> None:
    path = change(run)
    for verb, place, *more in (*verbs, ("info", "")):
        done = cli(verb, run / place, *more)
        told = done.out if verb == "report" and done.code == 0 else done.err
        assert f"{path}: " in told, (verb, done)
        assert "checksum is" in told, (verb, told)
        assert verb == "report" or (done.code, done.err.count("\n")) == (1, 1), (verb, done)


def test_info_leaves_alone_what_its_owner_keeps_there(run: Path, cli: Cli) -> None:
    (run / "notes.json").write_text("mine")
    (run / "pruned" / "small" / "mine.safetensors").write_text("mine")
    (run / "data").mkdir()
    (run / "data" / "train.json").write_text("mine")
    assert cli("info", run).code == 0
    done = cli("info", run / "data")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "not a folder of prunekit's" in done.err


def test_info_proves_a_whole_run(run: Path, cli: Cli) -> None:
    found = json.loads(cli("info", run, "--json").out)
    assert found["proved"] == len([p for p in run.rglob("*") if p.suffix in (".json", ".jsonl", ".safetensors")])


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("train", {"epochs": 4}, "train.epochs was 3, is now 4"),
        ("data", {"args": {"seed": 7}}, "data.args.seed was None, is now 7"),
    ],
    ids=["training", "data"],
)
def test_a_recipe_of_another_training_is_refused(part: str, change: dict, told: str, run: Path, cli: Cli) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe[part] |= change
    (run / "recipe.yaml").write_text(RESOLVED + yaml.safe_dump(recipe))
    for asked in (("eval", run / "pruned" / "small"), ("score", run, "-c", "snip"), ("prune", run, "-s", 0.3, "--name", "new")):
        done = cli(*asked)
        assert (done.code, done.err.count("\n")) == (1, 1), done
        assert f"not the recipe that {run / 'trajectory'} was recorded with" in done.err
        assert told in done.err


def test_another_device_is_no_other_training(run: Path, cli: Cli) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["threads"] = 2
    (run / "recipe.yaml").write_text(RESOLVED + yaml.safe_dump(recipe))
    assert cli("score", run, "-c", "magnitude").code == 0


def old(folder: Path) -> None:
    """As a prunekit without checksums wrote them."""
    for path in folder.rglob("*.json"):
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in (checkpoint.CHECKSUM, "files")}
        path.write_text(json.dumps(content))
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata:
            header = json.loads(metadata[checkpoint.HEADER])
            kept = {k: v for k, v in header.items() if k not in (checkpoint.CHECKSUM, checkpoint.TENSORS)}
            save_file(load_file(path), path, metadata={checkpoint.HEADER: json.dumps(kept)})


def test_files_without_checksums_are_read_with_a_note(run: Path, cli: Cli) -> None:
    old(run)
    done = cli("score", run, "-c", "magnitude")
    assert (done.code, done.err.count("\n")) == (0, 2), done
    assert f"prunekit: note: {run / 'scores'}: holds files of a prunekit without checksums" in done.err
    assert "reused" in done.out
    assert cli("score", run, "-c", "magnitude", "--quiet").err == ""
    assert cli("eval", run / "pruned" / "small").code == 0
    assert cli("info", run).code == 0
    with pytest.warns(Note, match="without checksums"):
        Comparison.load(run / "compare.json")


def test_files_may_not_be_exchanged_between_folders(run: Path, cli: Cli) -> None:
    assert cli("prune", run, "-c", "magnitude", "-s", 0.5, "--structure", "channels", "--name", "other").code == 0
    other, small = run / "pruned" / "other" / "model.safetensors", run / "pruned" / "small" / "model.safetensors"
    assert checkpoint.read_header(other)["plan"] != checkpoint.read_header(small)["plan"]
    content, header = checkpoint.read_tensors(small), checkpoint.read_header(small)
    next(iter(content.values())).view(-1)[0] += 1
    checkpoint.write_tensors(small, content, {k: v for k, v in header.items() if k != checkpoint.TENSORS})
    done = cli("eval", run / "pruned" / "small")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "is not the file that prunekit.json was written with" in done.err
    path = run / "trajectory"
    checkpoint.write_tensors(path / "fixed.safetensors", {}, {"kind": "fixed", "of": "another"})
    with pytest.raises(ArtifactError, match=r"fixed\.safetensors: is not the file that was recorded"):
        Trajectory(path).verify()


def test_a_choice_among_fewer_scores_than_were_compared_is_told(run: Path, cli: Cli) -> None:
    path = run / "scores" / "influence.safetensors"
    path.unlink()
    done = cli("prune", run, "-s", 0.3, "--no-refine", "--name", "new")
    assert done.code == 0
    assert done.err.count(f"prunekit: note: {path}: no such file, though compare.json was made with it") == 1
