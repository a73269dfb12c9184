"""compare --table: alone on stdout or in a file, of a study's folder, a study or a run; and what a study must do to be tabled."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from prunekit.report.paper import FORMATS
from prunekit.report.study import study_figure
from prunekit.search.paper_table import Measured, paper_tables
from prunekit.search.study import StudyRecord
from prunekit.search.study_rows import read_rows, rows_text
from prunekit.search.summary import summarise
from prunekit.task.evaluation import CLASSIFICATION
from tests.cli.conftest import RECIPE, Cli

MEASURES = CLASSIFICATION
NAMES = [m["name"] for m in MEASURES]
STUDY = """
cases: {small: small.yaml}
seeds: [0, 1]
samples: 24
criteria: [magnitude, random]
structures: {unstructured: [0.000001, 0.8]}
allocations: {unstructured: [global]}
control: false
tune: {epochs: 1, sparsities: {unstructured: [0.000001, 0.8]}}
"""


def figures(accuracy: float) -> dict[str, float]:
    return {name: accuracy if name == "accuracy" else 0.1 for name in NAMES}


def folder(path: Path, seeds: int = 3, sparsities: tuple[float, ...] = (0.5, 0.9), tuned: bool = True) -> Path:
    """A study's folder as prunekit writes it, of made-up figures."""
    rows: list[dict[str, Any]] = [
        {
            "case": "cnn", "seed": seed, "structure": "channels", "criterion": criterion, "allocation": "global",
            "sparsity": sparsity, "control": "", "epochs": epochs, "repair": "", "achieved": sparsity, "achieved_all": sparsity,
            "validation": figures(0.5), "test": figures(base - sparsity / 10 - seed / 100 + 0.003 * seed * seed * (base > 0.92)),
            **({"method": criterion} if epochs else {}),
        }
        for seed in range(seeds) for criterion, base in (("magnitude", 0.95), ("random", 0.9))
        for sparsity in sparsities for epochs in ((0, 2) if tuned else (0,))
    ]  # fmt: skip
    methods = {"magnitude": ["magnitude"], "random": ["random"]}
    control = {"dense_tuned": {"epochs": 2, "test": figures(0.98)}} if tuned else {}
    run = {"case": "cnn", "dense": {"test": figures(0.97)}, **control}
    path.mkdir()
    study = {"seeds": list(range(seeds)), "criteria": [*methods], "structures": {"channels": list(sparsities)}, "leading": 3,
             "always": ["magnitude"]}  # fmt: skip
    StudyRecord(
        study=study, machine="here", runs=[{**run, "seed": seed} for seed in range(seeds)], measures=list(MEASURES),
        summary=summarise(rows, methods, MEASURES), rows=len(rows), cost={},
    ).save(path / "compare.json")  # fmt: skip
    (path / "compare.csv").write_text(rows_text(rows, MEASURES))
    return path


def test_the_table_stands_alone_on_stdout(tmp_path: Path, cli: Cli) -> None:
    made = folder(tmp_path / "study")
    for options in ((), ("-q",)):
        latex = cli("compare", made, "--table", "latex", *options)
        assert latex.code == 0, latex.err
        assert latex.out.startswith("% needs \\usepackage{booktabs}\n\\begin{table}")
        assert latex.out.endswith("\\end{table}\n")
        assert latex.out.count("\\begin{table}") == 2  # one-shot, fine-tuned
        assert "dense, fine-tuned & $98.0 \\pm 0.0$" in latex.out
    lines = list(csv.DictReader(cli("compare", made, "--table", "csv").out.splitlines()))
    assert {(line["criterion"], line["made"]) for line in lines if line["0.9"]} == {
        *((name, "one-shot") for name in ("dense", "magnitude", "random")),
        *((name, "after 2 epochs of fine-tuning") for name in ("dense", "dense, fine-tuned", "magnitude", "random")),
    }


def test_a_file_is_of_the_format_that_its_name_ends_in(tmp_path: Path, cli: Cli) -> None:
    made = folder(tmp_path / "study")
    for name, form in (("t.tex", "latex"), ("t.md", "markdown"), ("t.csv", "csv")):
        done = cli("compare", made, "--table", tmp_path / name, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["table"] == str(tmp_path / name)
        assert (tmp_path / name).read_text() == cli("compare", made, "--table", form).out
    done = cli("compare", made, "--table", tmp_path / "t.tex")
    assert f"table: {tmp_path / 't.tex'}" in done.out
    assert "area under the curve" in done.out  # the study's own table is shown as well


def test_rows_and_reference_can_be_chosen(tmp_path: Path, cli: Cli) -> None:
    made = folder(tmp_path / "study")
    done = cli("compare", made, "--table", "markdown", "--rows", "sparsity", "--against", "magnitude")
    assert "| sparsity | dense | magnitude | random |" in done.out
    assert "the difference to magnitude" in done.out
    assert "(+" in done.out  # dense is ahead of it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--table", "html"], "--table is 'html'; give latex, markdown, csv, or a file"),
        (["--table", "nowhere/t.tex"], "no folder nowhere"),
        (["--table", "latex", "--rows", "seed"], "--rows is 'seed'; give criterion or sparsity"),
        (["--table", "latex", "--against", "magnitud"], "did you mean magnitude"),
        (["--rows", "sparsity"], "give --table"),
        (["--table", "latex", "--json"], "both write to stdout"),
        (["--table", "latex", "--sparsity", "0.5"], "is a study's folder"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, cli: Cli, options: list[str], said: str) -> None:
    done = cli("compare", folder(tmp_path / "study"), *options)
    assert done.code == 2
    assert said in done.err
    assert not done.out


def test_a_reference_that_a_study_will_not_have_is_refused_before_it_begins(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "study.yaml").write_text(STUDY)
    for against in ("lamp", "magnitude, refined"):
        done = cli("compare", tmp_path / "study.yaml", "--out", tmp_path / "out", "--table", "latex", "--against", against)
        assert done.code == 2
        assert f"--against is '{against}'" in done.err
        assert not (tmp_path / "out" / "runs").exists()


def test_one_seed_and_one_sparsity_are_called_so(tmp_path: Path, cli: Cli) -> None:
    made = folder(tmp_path / "study", seeds=1, sparsities=(0.5,), tuned=False)
    shown = cli("compare", made).out
    assert "area" not in shown
    assert "one seed (0)" in shown
    assert "channels at 0.5" in shown
    for form in FORMATS:
        assert "one seed (0)" in cli("compare", made, "--table", form).out


def test_a_damaged_table_of_figures_is_named(tmp_path: Path, cli: Cli) -> None:
    made = folder(tmp_path / "study")
    table = made / "compare.csv"
    whole = table.read_text()
    for text, said in (
        (whole.replace("0.5,,", "half,,", 1), "line 2: sparsity is 'half', no number"),
        (whole.replace("test_accuracy", "test_acuracy"), "line 2 has no test_accuracy"),
        ("\n".join(whole.splitlines()[:-1]) + "\n", "has 23 rows, compare.json tells of 24"),
        (whole.replace("channels", '"chan"nels', 1), "line 2 is no line"),
    ):
        table.write_text(text)
        done = cli("compare", made, "--table", "latex")
        assert done.code == 1
        assert str(table) in done.err
        assert said in done.err
        assert len(done.err.strip().splitlines()) == 1


def test_curves_have_bars_and_the_dense_lines(tmp_path: Path) -> None:
    made = folder(tmp_path / "study")
    record = StudyRecord.load(made / "compare.json")
    measured = Measured.of_study(record, read_rows(made / "compare.csv", MEASURES), {n: [n] for n in ("magnitude", "random")})
    one_shot, tuned = study_figure(measured, record.summary).axes
    for panel, dense in ((one_shot, {"dense": 97.0}), (tuned, {"dense": 97.0, "dense, fine-tuned": 98.0})):
        lines = {line.get_label(): line for line in panel.lines}
        for name, figure in dense.items():
            assert list(lines[name].get_ydata()) == pytest.approx([figure, figure])
        bars = {bar.get_label(): bar for bar in panel.containers}
        assert bars.keys() == {"magnitude", "random"}
        table = paper_tables(measured)[0 if panel is one_shot else 1]
        for name, bar in bars.items():
            (segments,) = bar.lines[2]
            half = [(high - low) / 2 for (_, low), (_, high) in segments.get_segments()]
            assert half == pytest.approx([entry.std for _, entry in sorted(table.cases["cnn"][name].items())])
        assert panel.get_legend_handles_labels()[1].count("auto") == (panel is one_shot)


@pytest.mark.slow
def test_every_criterion_is_tuned_on_every_seed_and_the_dense_model_too(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "study.yaml").write_text(STUDY)
    out = tmp_path / "out"
    done = cli("compare", tmp_path / "study.yaml", "--out", out, "--table", "latex")
    assert done.code == 0, done.err
    assert done.out.startswith("% needs")
    assert "2 seeds (0, 1)" in done.out
    assert "too few for a test" in done.out
    record = StudyRecord.load(out / "compare.json")
    rows = [row for row in read_rows(out / "compare.csv", record.measures) if row["epochs"]]
    assert {(row["seed"], row["method"], row["sparsity"]) for row in rows} == {
        (seed, method, sparsity) for seed in (0, 1) for method in ("magnitude", "random") for sparsity in (0.000001, 0.8)
    }
    for run in record.runs:  # a plan that removes nothing, fine-tuned, is the dense control
        for row in rows:
            if row["seed"] == run["seed"] and row["sparsity"] < 0.1:
                assert row["achieved"] == 0
                assert row["test"] == run["dense_tuned"]["test"]
                assert row["validation"] == run["dense_tuned"]["validation"]
    # a few only where that is asked for; cells of the others, which lie there, do not come back
    (tmp_path / "study.yaml").write_text(STUDY + "leading: 0\nalways: [magnitude]\n")
    assert cli("compare", tmp_path / "study.yaml", "--out", out).code == 0
    rows = [row for row in read_rows(out / "compare.csv", record.measures) if row["epochs"]]
    assert {row["method"] for row in rows} == {"magnitude"}


@pytest.mark.slow
def test_a_runs_own_comparison_is_a_table_of_validation_data(run: Path, cli: Cli) -> None:
    done = cli("compare", run, "--table", "markdown")
    assert done.code == 0, done.err
    assert done.out.startswith("Validation accuracy in %")
    assert "one seed (3)" in done.out
