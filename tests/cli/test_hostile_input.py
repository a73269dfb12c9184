"""Input of any shape ends: in one line that names the file, within a second, and nothing is written outside the run folder."""

from __future__ import annotations

import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
from prunekit import bounded, checkpoint, load, make_plan, prune, save, score
from prunekit.cli.output import Output
from prunekit.criteria import parse
from prunekit.errors import NonFiniteError, PrunekitError, UsageError
from prunekit.links import refuse_links_out
from prunekit.search.study import Cells
from prunekit.steps.planner import Planner
from prunekit.trajectory import Trajectory
from tests.cli.conftest import RECIPE, Cli
from tests.cli.test_bad_input import one_line


def nine_levels(of: str, first: str) -> str:
    return "\n".join([f"a0: &a0 {first}", *(f"a{i}: &a{i} " + of.format(",".join([f"*a{i - 1}"] * 10)) for i in range(1, 10))])


LARGE = {
    "lists of aliases": (nine_levels("[{}]", "[x, x]"), "aliases stand for more than"),
    "merged aliases": (nine_levels("{{<<: [{}]}}", "{x: 1}"), "aliases stand for more than"),
    "300 lists": ("model: {factory: 'a:b', args: {x: " + "[" * 300 + "]" * 300 + "}}", "nested deeper than"),
    "20,000 brackets": ("[" * 20_000, "nested deeper than"),
    "20,000 dashes": ("- " * 20_000, "nested deeper than"),
    "a whole number": ("seed: " + "9" * 10_000, "a number of 10,000 digits"),
    "an infinite number": ("seed: 1e999", "larger than any number"),
    "many unknown keys": ("\n".join(f"k{i}: 1" for i in range(300)), "more"),
    "more than a recipe has": ("# " + "x" * bounded.RECIPE, "bytes; such a file has"),
}


@pytest.mark.parametrize("what", LARGE)
def test_recipes_that_stand_for_more_than_they_take(what: str, cli: Cli, tmp_path: Path) -> None:
    text, said = LARGE[what]
    (tmp_path / "recipe.yaml").write_text(text)
    began = time.perf_counter()
    one_line(cli("info", tmp_path / "recipe.yaml"), 2, said, "recipe.yaml")
    one_line(cli("info", tmp_path), 2, said, "recipe.yaml")
    for command in (
        ("train", tmp_path / "recipe.yaml"),
        ("run", tmp_path / "recipe.yaml"),
        ("compare", tmp_path / "recipe.yaml"),
    ):
        done = cli(*command, "--out", tmp_path / "out")
        one_line(done, 2, said, "recipe.yaml")
        assert len(done.err) < 2_000
    one_line(cli("score", tmp_path, "-c", "magnitude"), 2, said, "recipe.yaml")
    assert time.perf_counter() - began < 15  # five verbs, on a busy machine


def test_files_are_refused_by_their_size_before_they_are_read(cli: Cli, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "train.json", "trajectory.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**12)
        one_line(cli("info", tmp_path / name), 2 if name == "recipe.yaml" else 1, name, "1,000,000,000,000 bytes")


JSONS = {
    "nested": ("[" * 100_000, "nested deeper than"),
    "nested and closed": ('{"kind": "train", "x": ' + "[" * 80 + "]" * 80 + "}", "nested deeper than"),
    "digits": ('{"kind": "train", "x": ' + "9" * 10_000 + "}", "digits"),
    "an infinite number": ('{"kind": "train", "x": 1e999}', "larger than any number"),
    "NaN": ('{"kind": "train", "x": NaN}', "NaN is not JSON"),
    "many values": ("[" + "[]," * (bounded.VALUES // 2 + 1) + "[]]", "values"),
    "no text": (b"\xff\xfe", "not text in UTF-8"),
}


@pytest.mark.parametrize("what", JSONS)
def test_json_is_read_within_bounds(what: str, tmp_path: Path, cli: Cli) -> None:
    content, said = JSONS[what]
    path = tmp_path / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PrunekitError, match=said):
        checkpoint.read_json(path, "train")
    one_line(cli("info", path), 1, said)


def header(facts: object, more: bytes = b"") -> bytes:
    text = json.dumps(facts).encode()
    return struct.pack("<Q", len(text)) + text + more


TENSORS = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "longest": struct.pack("<Q", 2**64 - 1),
    "no header": b"\0\0",
    "a shape that overflows": header({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"\0" * 4),
    "offsets beyond the file": header({"w": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}),
    "offsets backwards": header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
    "an unknown type": header({"w": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "nested metadata": header({"__metadata__": {"prunekit": "[" * 10_000}}),
    "no mapping": header([1]),
}


@pytest.mark.parametrize("what", TENSORS)
def test_headers_that_promise_what_is_not_there(what: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "w.safetensors").write_bytes(TENSORS[what])
    one_line(cli("info", tmp_path / "w.safetensors"), 1, "w.safetensors")


@pytest.mark.parametrize("stream", ["states", "second_moments", "random"])
def test_blocks_of_a_recording_are_looked_at_before_they_are_read(stream: str, recorded: Path, cli: Cli) -> None:
    for path in recorded.glob(f"{stream}-*"):
        path.write_bytes(TENSORS["longer than the file"])
        done = cli("info", recorded)
        assert done.code in (0, 1)
        assert done.err.count("\n") == done.code
        assert "PRUNEKIT_DEBUG" not in done.err


@pytest.fixture
def recorded(tiny_run: tuple[torch.nn.Module, Trajectory]) -> Path:
    return tiny_run[1].folder


@pytest.mark.parametrize("name", ["trajectory.json", "steps.jsonl", "states-00000.safetensors", "start.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, recorded: Path, cli: Cli) -> None:
    (recorded / name).unlink()
    os.mkfifo(recorded / name)
    one_line(cli("info", recorded), 1, name, "is a named pipe, not a file")


def test_a_pipe_or_device_is_no_recipe(cli: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    for command in (("info", tmp_path), ("info", tmp_path / "recipe.yaml"), ("score", tmp_path, "-c", "magnitude"),
                    ("train", tmp_path / "recipe.yaml", "--out", tmp_path / "out"), ("report", tmp_path)):  # fmt: skip
        one_line(cli(*command), 2, "is a named pipe, not a file")
    one_line(cli("train", "/dev/zero", "--out", tmp_path / "out"), 2, "/dev/zero: is a device, not a file")
    (tmp_path / "r.yaml").write_text(RECIPE)
    one_line(cli("train", tmp_path / "r.yaml", "--out", tmp_path), 2, "is not a recipe that prunekit wrote")


LINKS = ("trajectory.partial", "trajectory", "scores", "pruned", "pruned/x", "explain", ".lock", "train.json", "compare.json")


@pytest.mark.parametrize("name", LINKS)
def test_links_that_lead_out_of_a_run_folder_are_not_followed(name: str, cli: Cli, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(elsewhere / "made" if name == ".lock" else elsewhere)
    (tmp_path / "r.yaml").write_text(RECIPE)
    said = (str(run / name), "leads out of the run folder", str(elsewhere))
    one_line(cli("train", tmp_path / "r.yaml", "--out", run), 1, *said)
    one_line(cli("compare", tmp_path / "r.yaml", "--out", run), 1, *said)
    (run / "recipe.yaml").write_text(RECIPE)
    for verb, *options in (("score", "-c", "magnitude"), ("compare",), ("prune", "-s", "0.5"), ("report",), ("info",)):
        one_line(cli(verb, run, *options), 1, *said)
    one_line(cli("eval", run / "pruned" / "x"), 1, *said)
    assert not list(elsewhere.iterdir())


def test_a_run_folder_may_lie_behind_a_link_and_have_links_inside(tmp_path: Path) -> None:
    (tmp_path / "run" / "pruned" / "a").mkdir(parents=True)
    (tmp_path / "run" / "pruned" / "b").symlink_to("a")
    (tmp_path / "run" / ".venv").symlink_to("/usr")  # somebody works in this folder
    (tmp_path / "run" / "mine").mkdir()
    (tmp_path / "run" / "mine" / "data").symlink_to("/usr")  # and has folders there that prunekit does not know
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "mine").symlink_to(tmp_path / "run")
    for folder in ("run", "mine", "absent"):
        refuse_links_out(tmp_path / folder)
    with pytest.raises(PrunekitError, match="loop: cannot be looked through"):
        refuse_links_out(tmp_path / "loop")
    (tmp_path / "run" / "pruned" / "b").unlink()
    (tmp_path / "run" / "pruned" / "b").symlink_to("../../run-2")
    with pytest.raises(PrunekitError, match="mine/pruned/b: is a link"):
        refuse_links_out(tmp_path / "mine")


def test_arguments_of_any_length_end(cli: Cli, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("info", "a" * 5_000), 1, "no such file or folder"),
        (("info", "/"), 1, "not a folder of prunekit's"),  # which is not looked through
        (("score", tmp_path, "-c", "magnitude", "--nodes", "9" * 5_000), 2, "a number of more than 300 digits"),
        (("prune", tmp_path, "--structure", "9" * 100 + ":4", "-s", "0.5"), 2, "does not exist"),
        (
            ("import", "--model", "a:b", "--weights", "x", "--out", tmp_path / "o", "--model-args", "[" * 50_000),
            2,
            "nested deeper",
        ),
    ):
        done = cli(*arguments)
        one_line(done, code, said)
        assert len(done.err) < 2_000
    with pytest.raises(UsageError, match="has 20,000 characters; a name has 2,000 at most"):
        parse("(" * 20_000)


RED = "\x1b[31mred\x07\u202e"


def test_no_escape_of_a_file_reaches_a_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"schema": 1, "kind": RED, "note": {RED: [RED]}}))
    done = cli("info", tmp_path / "a.json")
    assert done.code == 0
    assert "\\x1b[31mred\\x07\\u202e" in done.out
    (tmp_path / "r.yaml").write_text(json.dumps({"seed": RED, RED: 1}))
    for command in (
        ("info", tmp_path / "r.yaml"),
        ("info", RED),
        ("train", "r", "--out", RED),
        ("score", "x", "-c", RED),
        (RED,),
    ):
        done = cli(*command)
        assert done.code in (1, 2)
        assert done.err.rstrip("\n").isprintable()
    assert "\\x1b" in cli("info", RED).err


def test_no_escape_in_tables_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    from prunekit.report.terminal.tables import new_table, print_table

    def show(_: object) -> None:
        table = new_table(RED, RED)
        table.add_row(RED)
        print_table(table)

    output = Output(False, False)
    output.show(show, None)
    output.note(f"one\n{RED}")
    printed = capsys.readouterr()
    assert printed.out.count("\\x1b[31mred") == 3
    assert printed.err == "one\n\\x1b[31mred\\x07\\u202e\n"
    assert (printed.out + printed.err).replace("\n", "").isprintable()


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from prunekit.report.plots import save_figure

    figure = Figure(layout="constrained")
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], label=r"$\frac$")
    panel.set_title(r"$\frac{$")
    panel.set_xlabel(r"price in $ and $\nothing$")
    panel.set_xticks([0, 1], [r"$\frac$", r"$x^$"])
    panel.legend()
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def small(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A dense model, and the folder of one that was pruned from it."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
    save(prune(model, plan), plan, tmp_path / "small")
    return model, tmp_path / "small"


def rewritten(path: Path, header: Callable[[dict[str, object]], dict[str, object]], **tensors: torch.Tensor) -> None:
    """A safetensors file with another header and other tensors, and no checksum that would tell."""
    facts = {k: v for k, v in checkpoint.read_header(path).items() if k not in (checkpoint.CHECKSUM, checkpoint.TENSORS)}
    save_file({**load_file(path), **tensors}, path, {checkpoint.HEADER: json.dumps(header(facts))})


def without_checksums(folder: Path) -> None:
    path = folder / "prunekit.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k not in (checkpoint.CHECKSUM, "files")}))


@pytest.mark.filterwarnings("ignore::prunekit.errors.Note")
def test_a_pruned_model_with_nan_or_without_a_plan_is_named(small: tuple[torch.nn.Module, Path]) -> None:
    model, folder = small
    without_checksums(folder)
    path = folder / "model.safetensors"
    rewritten(path, lambda facts: facts, **{"0.bias": torch.full((8,), torch.nan)})
    with pytest.raises(NonFiniteError, match=r"model\.safetensors: 0\.bias holds NaN"):
        load(folder, lambda: model)
    rewritten(path, lambda facts: {k: v for k, v in facts.items() if k != "plan"}, **{"0.bias": torch.zeros(8)})
    with pytest.raises(PrunekitError, match=r"model\.safetensors belongs to plan None"):
        load(folder, lambda: model)


def test_wrong_arguments_in_python_are_named(small: tuple[torch.nn.Module, Path]) -> None:
    model, folder = small
    path, x = Trajectory.of(model), torch.randn(16, 4)
    data = [(x, x[:, 0].gt(0).long())]
    for wrong, said in (
        (lambda: prunekit.compress(model, data, seed=None), "seed is None; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: score(path, model, data, criterion=3), "criterion is 3; it must be a name"),  # type: ignore[arg-type]
        (lambda: score(path, model, data, nods=3), "score has no option 'nods'; did you mean nodes"),
        (lambda: Planner.of(path, model, data, foo=1), "score has no option 'foo'"),
        (lambda: load(folder, model), "model_factory is a Sequential; give a function"),
        (lambda: load(folder, lambda: 3), "model_factory returned a int"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(said)):
            wrong()


def test_nan_in_the_data_is_told_of_the_data() -> None:
    model = torch.nn.Linear(4, 2)
    x = torch.randn(16, 4)
    x[3, 1] = torch.nan
    for batches in ([(x, x[:, 0].gt(0).long())], [(x[4:8], torch.zeros(4).long()), (x[:4], torch.zeros(4).long())]):
        for criterion in ("taylor(target=margin)", "gradient"):
            with pytest.raises(PrunekitError, match=r"data: inputs of the scoring samples hold NaN \(batch \d\)"):
                score(Trajectory.of(model), model, batches, criterion=criterion)


ROW = {
    "structure": "unstructured", "criterion": "magnitude", "allocation": "global", "sparsity": 0.5, "control": "", "epochs": 0,
    "repair": "", "achieved": 0.5, "achieved_all": 0.4, "kept": {"a": 1}, "validation": {"kl": 0.1}, "test": {"kl": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"sparsity": "half"}, {"validation": None}, {"test": {"kl": "x"}}, {"test": {}}, {"again": 0.5}]
)
def test_rows_of_a_study_are_looked_at(wrong: dict[str, object], tmp_path: Path) -> None:
    Cells(made_from={}, rows=[ROW]).save(tmp_path / "c.json")
    assert Cells.load(tmp_path / "c.json").rows == [ROW]
    Cells(made_from={}, rows=[ROW, {**ROW, **wrong}]).save(tmp_path / "c.json")
    with pytest.raises(PrunekitError, match=r"c\.json: not a whole cells \(rows\[1\]"):
        Cells.load(tmp_path / "c.json")


def test_a_report_tells_of_a_damaged_file_once_and_how_to_replace_it(run: Path, cli: Cli) -> None:
    assert cli("score", run, "-c", "magnitude*taylor", "-c", "magnitude^0.5*taylor").code == 0
    for damaged in (run / "scores" / "taylor.safetensors", run / "pruned" / "small" / "eval.json"):
        damaged.write_bytes(damaged.read_bytes()[:-20])
    done = cli("report", run)
    assert done.code == 0
    assert done.out.count("left out: " + str(run / "scores" / "taylor.safetensors")) == 1
    assert f"prunekit eval {run / 'pruned' / 'small'} --overwrite adds it" in done.out
