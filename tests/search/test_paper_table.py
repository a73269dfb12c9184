"""Tables for a paper: figures by seed, paired tests against the best or a named row, and what a caption must say."""

from __future__ import annotations

import csv
import io
import re
import statistics
from typing import Any

import pytest
from scipy import stats

from prunekit.errors import UsageError
from prunekit.report.paper import FORMATS
from prunekit.report.paper.grid import caption
from prunekit.report.paper.latex import escaped
from prunekit.search.compare import Comparison
from prunekit.search.paper_table import Measured, PaperTable, paper_tables
from prunekit.task.evaluation import CLASSIFICATION

AWKWARD = r"mine_50%:a&b#c^0.5*~x{y}$z|w\v--q"
FIGURES = {  # criterion -> sparsity -> test accuracy by seed
    "magnitude": {0.5: [0.95, 0.94, 0.96, 0.95], 0.9: [0.60, 0.62, 0.58, 0.61]},
    "taylor": {0.5: [0.93, 0.91, 0.95, 0.92], 0.9: [0.70, 0.74, 0.69, 0.73]},
    AWKWARD: {0.5: [0.90, 0.88, 0.93, 0.86], 0.9: [0.65, 0.60, 0.71, 0.58]},
}


def row(seed: int, criterion: str, sparsity: float, test: float, **more: Any) -> dict[str, Any]:
    return {
        "case": "cnn", "seed": seed, "structure": "unstructured", "criterion": criterion, "allocation": "global",
        "sparsity": sparsity, "control": "", "epochs": 0, "repair": "", "method": "", "achieved": sparsity + 0.01,
        "validation": {"accuracy": 0.5}, "test": {"accuracy": test}, **more,
    }  # fmt: skip


def measured(seeds: int = 4, rows: list[dict[str, Any]] | None = None) -> Measured:
    every = [
        row(seed, criterion, sparsity, figure)
        for criterion, by in FIGURES.items()
        for sparsity, figures in by.items()
        for seed, figure in enumerate(figures[:seeds])
    ]
    dense = {"cnn": {0: dict.fromkeys(range(seeds), 97.0), 3: dict.fromkeys(range(seeds), 97.5)}}
    return Measured([*every, *(rows or [])], {name: [name] for name in FIGURES}, CLASSIFICATION[:1], "test", dense)


def text(table: PaperTable) -> str:
    return " ".join(caption(table))


def test_means_deviations_and_paired_tests_are_those_of_the_rows() -> None:
    (table,) = paper_tables(measured())
    best, other = FIGURES["taylor"][0.9], FIGURES["magnitude"][0.9]
    entry = table.cases["cnn"]["magnitude"][0.9]
    assert entry.mean == pytest.approx(100 * statistics.fmean(other))
    assert entry.std == pytest.approx(100 * statistics.stdev(other))
    assert entry.test is not None
    assert entry.test.p == pytest.approx(stats.ttest_rel(other, best).pvalue)
    assert entry.test.mean == pytest.approx(100 * (statistics.fmean(other) - statistics.fmean(best)))
    assert table.cases["cnn"]["taylor"][0.9].best
    assert table.cases["cnn"]["magnitude"][0.5].best
    assert table.cases["cnn"]["taylor"][0.9].test is None
    assert (list(table.cases["cnn"]), table.cases["cnn"]["dense"][0.5].mean) == (["dense", *FIGURES], 97.0)


def test_against_a_named_row_or_the_dense_model() -> None:
    for name in ("magnitude", "dense"):
        (table,) = paper_tables(measured(), name)
        for sparsity in (0.5, 0.9):
            theirs = table.cases["cnn"][name][sparsity]
            assert theirs.test is None
            for line in table.cases["cnn"].values():
                if line[sparsity] is not theirs:
                    assert line[sparsity].test is not None
                    assert line[sparsity].test.mean == pytest.approx(line[sparsity].mean - theirs.mean)
        assert f"the difference to {name}" in text(table)
    with pytest.raises(UsageError, match=r"--against is 'magnitud'.*did you mean magnitude"):
        paper_tables(measured(), "magnitud")


@pytest.mark.parametrize(
    ("seeds", "said", "unsaid"),
    [
        (
            4,
            ["4 seeds (0, 1, 2, 3)", "paired t-test with 3 degrees of freedom", "p < 0.05, 0.01, 0.001"],
            ["too few", "one seed"],
        ),
        (2, ["2 seeds (0, 1)", "Two seeds are too few for a test"], ["t-test"]),
        (1, ["one seed (0)", "does not show which criterion is better"], ["±", "t-test"]),
    ],
)
def test_a_caption_says_how_many_seeds_and_which_test(seeds: int, said: list[str], unsaid: list[str]) -> None:
    (table,) = paper_tables(measured(seeds))
    for words in (*said, "Test accuracy", "one-shot", "within 0.01"):
        assert words in text(table)
    for words in unsaid:
        assert words not in text(table)
    for form, write in FORMATS.items():
        assert ("one seed" in write([table], False)) == (seeds == 1), form
    stars = re.findall(r"\^\{(\*+)\}", FORMATS["latex"]([table], False))
    assert bool(stars) == (seeds == 4)


def test_fine_tuned_rows_have_a_table_with_the_dense_model_trained_on() -> None:
    tuned = [row(seed, "taylor", 0.9, 0.9 + seed / 100, method="taylor", epochs=3) for seed in range(4)]
    some = [row(seed, "magnitude", 0.9, 0.99, method="magnitude", epochs=3) for seed in (1, 2)]
    repaired = [row(seed, "magnitude", 0.9, 0.8, method="magnitude", repair="refined") for seed in range(4)]
    shot, after = paper_tables(measured(4, [*tuned, *some, *repaired]))
    assert "magnitude, refined" in shot.cases["cnn"]
    assert (shot.epochs, after.epochs, after.sparsities) == (0, 3, [0.9])
    assert list(after.cases["cnn"]) == ["dense", "dense, fine-tuned", "magnitude", "taylor"]
    assert after.cases["cnn"]["dense, fine-tuned"][0.9].mean == 97.5
    assert "after 3 epochs of fine-tuning" in text(after)
    # what was measured for some seeds alone is no best, and says so
    assert after.cases["cnn"]["magnitude"][0.9].mean > after.cases["cnn"]["taylor"][0.9].mean
    assert not after.cases["cnn"]["magnitude"][0.9].best
    assert "[2/4]" in FORMATS["markdown"]([after], False).replace("\\", "")
    assert "led on validation" in text(after)


def test_a_runs_own_comparison_is_of_validation_data_and_one_seed() -> None:
    cells = [
        {"structure": "channels", "criterion": name, "allocation": allocation, "sparsity": 0.5, "repair": repair, "achieved": 0.5,
         "achieved_all": 0.4, "accuracy": figure}
        for name, allocation, repair, figure in (
            ("magnitude", "global", "", 0.7), ("magnitude", "uniform", "", 0.8), ("taylor", "global", "", 0.75),
            ("magnitude", "uniform", "refined", 0.9),
        )
    ]  # fmt: skip
    found = Comparison(made_from={}, dense={"accuracy": 0.97}, measures=list(CLASSIFICATION[:1]), cells=cells, cost={})
    (table,) = paper_tables(Measured.of_run("digits", 7, found))
    assert {name: line[0.5].figures[7] for name, line in table.cases["digits"].items()} == pytest.approx(
        {"dense": 97.0, "magnitude": 80.0, "taylor": 75.0, "best plan, refined": 90.0}
    )
    assert text(table).startswith("Validation accuracy")
    assert "one seed (7)" in text(table)
    assert "no test data" in text(table)


@pytest.mark.parametrize("transposed", [False, True])
def test_latex_is_balanced_and_escaped(transposed: bool) -> None:
    tables = paper_tables(measured())
    made = FORMATS["latex"](tables, transposed)
    body = re.sub(r"(?m)^%.*$", "", made)
    begun, ended = re.findall(r"\\begin\{(\w+)\}", body), re.findall(r"\\end\{(\w+)\}", body)
    assert begun == ["table", "tabular"]
    assert ended == ["tabular", "table"]
    bare = re.sub(r"\\[\\{}$&#%_]", "", body)  # what is escaped is no syntax
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not set("#%~") & set(bare)
    outside = re.sub(r"\$[^$]*\$", "", bare)
    assert not set('^_<>|"') & set(outside)
    (columns,) = re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}", body)
    lines = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") + 1 for line in lines} == {len(columns)}
    assert len(lines) == (3 if transposed else 5)  # head, and 2 sparsities or dense and 3 criteria
    assert body.isascii()
    for rule in ("toprule", "midrule", "bottomrule"):
        assert rf"\{rule}" in body
    assert made.startswith("% needs \\usepackage{booktabs}")


def test_characters_of_latex_are_written_out() -> None:
    assert escaped("a_b^2") == r"a\_b\textasciicircum{}2"
    assert escaped("\\x{%}") == r"\textbackslash{}x\{\%\}"
    assert escaped("a--b\n c") == "a-{}-b c"


@pytest.mark.parametrize("transposed", [False, True])
def test_markdown_has_a_cell_for_every_column(transposed: bool) -> None:
    made = FORMATS["markdown"](paper_tables(measured()), transposed)
    lines = [re.sub(r"\\.", "", line) for line in made.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5 + 1 if transposed else 3 + 1}
    assert len(lines) == 2 + (2 if transposed else 4)
    assert "**95.0 ± 0.8**" in made


@pytest.mark.parametrize("transposed", [False, True])
def test_csv_holds_the_numbers_unrounded(transposed: bool) -> None:
    (table,) = paper_tables(measured(), "magnitude")
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"]([table], transposed))))
    assert len(lines) == (2 if transposed else 4)
    for name, line in table.cases["cnn"].items():
        for sparsity, entry in line.items():
            key, column = (f"{sparsity:g}", name) if transposed else (name, f"{sparsity:g}")
            (found,) = [one for one in lines if one["sparsity" if transposed else "criterion"] == key]
            assert float(found[column]) == entry.mean
            assert float(found[f"{column} std"]) == entry.std
            if entry.test is not None and entry.test.p is not None:
                assert float(found[f"{column} p"]) == entry.test.p
                assert float(found[f"{column} low"]) < float(found[f"{column} difference"]) < float(found[f"{column} high"])
            assert found["data"] == "test"
