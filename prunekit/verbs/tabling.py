"""compare --table: the figures of a study or of a run as a table for a paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunekit import checkpoint
from prunekit.criteria import expand
from prunekit.errors import ArtifactError, UsageError
from prunekit.imports import needed
from prunekit.recipe import Study
from prunekit.remote import Place
from prunekit.report.paper import FORMATS
from prunekit.search import Comparison
from prunekit.search.paper_table import DENSE, DENSE_TUNED, Measured, check_reference, methods_of, paper_tables
from prunekit.search.study import StudyRecord
from prunekit.search.study_rows import read_rows

SUFFIXES = {".tex": "latex", ".md": "markdown", ".csv": "csv"}
ROWS = ("criterion", "sparsity")


@dataclass(frozen=True)
class TableAsked:
    """What ``--table``, ``--rows`` and ``--against`` say.

    Attributes:
        form: of ``prunekit.report.paper.FORMATS``.
        file: to write; None for stdout.
        rows: what a row is.
        against: the row that others are held against; None for the best.
    """

    form: str
    file: Path | None
    rows: str
    against: str | None

    @classmethod
    def of(cls, table: str, rows: str | None, against: str | None) -> TableAsked:
        """Reads the options.

        Raises:
            UsageError: no such format, file or row, or scipy, whose tests a table has, is not installed.
        """
        needed("scipy")
        file = None if table in FORMATS else Path(table)
        form = table if file is None else SUFFIXES.get(file.suffix.lower(), "")
        if not form:
            raise UsageError(
                f"--table is {table!r}; give {', '.join(FORMATS)}, or a file whose name ends in {', '.join(SUFFIXES)}"
            )
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"--table is {table!r}, but there is no folder {file.parent}; make it first")
        if file is not None and file.is_dir():
            raise UsageError(f"--table is {table!r}, a folder; give a file")
        if rows not in (None, *ROWS):
            raise UsageError(f"--rows is {rows!r}; give {' or '.join(ROWS)}")
        return cls(form, file, rows or ROWS[0], _named(against))

    def check(self, study: Study) -> None:
        """Refuses a reference that a study will not have, before anything is measured.

        Raises:
            UsageError: names those that it will have.
        """
        ways = dict.fromkeys(way for structure in study.structures for way in study.ways_of(structure))
        if self.against is not None and not any(self.against.endswith(f", {way}") for way in (*ways, *REPAIRED)):
            dense = [DENSE, DENSE_TUNED] if study.fine_tunes else [DENSE]
            check_reference(self.against, [*study.criteria, *dense])

    def write(self, measured: Measured) -> str:
        """The text, which is also written where a file was asked for.

        Raises:
            UsageError: no table has the row that others are to be held against.
            ArtifactError: the file could not be written.
        """
        text = FORMATS[self.form](paper_tables(measured, self.against), self.rows == "sparsity")
        if self.file is not None:
            checkpoint.write_text(self.file, text)
        return text


REPAIRED = ("compensated", "refined again")


def _named(against: str | None) -> str | None:
    """A criterion by its canonical name, which is what tables have."""
    if against is None:
        return None
    try:
        names = expand(against)
    except UsageError:
        return against  # "dense", "magnitude, refined", or a mistake, which is told with the names that there are
    return names[0] if len(names) == 1 else against


def read_study(folder: Place) -> tuple[StudyRecord, Measured]:
    """What ``prunekit compare STUDY --out FOLDER`` left there.

    Raises:
        ArtifactError: it is missing, damaged, or of two studies.
    """
    study = StudyRecord.load(folder / "compare.json")
    rows = read_rows(folder / "compare.csv", study.measures)
    if len(rows) != study.rows:
        raise ArtifactError(
            f"{folder / 'compare.csv'}: has {len(rows):,} rows, compare.json tells of {study.rows:,}; run the study again"
        )
    with checkpoint.reading(folder / "compare.json", "study"):
        return study, Measured.of_study(study, rows, methods_of(study.study["criteria"]))


def measured_of_run(path: Path, seed: int, comparison: Comparison) -> Measured:
    """A run's own comparison, which is of one seed."""
    return Measured.of_run(path.resolve().name, seed, comparison)
