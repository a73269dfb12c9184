"""LaTeX: a ``table`` with booktabs' rules for every table, to be put into a paper as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunekit.report.paper.grid import Marks, caption, grid
from prunekit.search.paper_table import PaperTable

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "×": r"$\times$", "²": r"\textsuperscript{2}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$",
}  # fmt: skip
"""Characters that LaTeX takes for its own, or that its default fonts lack."""


def escaped(text: str) -> str:
    """A text that is set as it is written; dashes and question marks do not melt, line ends are spaces."""
    plain = "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))
    plain = re.sub(r"--+", lambda found: "-" + "{}-" * (len(found[0]) - 1), plain)
    return re.sub("([?!])`", r"\1{}`", plain)


def _spread(mean: str, std: str, best: bool) -> str:
    inside = f"{mean} \\pm {std}" if std else mean
    return f"$\\mathbf{{{inside}}}$" if best else f"${inside}$"


def _difference(number: str, stars: int) -> str:
    return f"(${number}^{{{'*' * stars}}}$)" if stars else f"(${number}$)"


MARKS = Marks(escaped, _spread, _difference, "--")


def latex_tables(tables: Sequence[PaperTable], transposed: bool) -> str:
    r"""A ``table`` for every table; a document needs ``\usepackage{booktabs}`` to take them."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_table(table, transposed) for table in tables)


def _table(table: PaperTable, transposed: bool) -> str:
    made = grid(table, transposed, MARKS)
    columns = 1 + len(made.heads)
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escaped(' '.join(caption(table)))}}}",
        f"  \\label{{tab:{_label(table)}}}",
        f"  \\begin{{tabular}}{{l{'r' * len(made.heads)}}}",
        r"    \toprule",
    ]
    if not transposed:
        lines += [f"    & \\multicolumn{{{len(made.heads)}}}{{c}}{{sparsity}} \\\\", f"    \\cmidrule(lr){{2-{columns}}}"]
    lines.append(f"    {' & '.join([made.corner, *made.heads])} \\\\")
    for case, rows in made.cases.items():
        lines.append(r"    \midrule")
        if len(made.cases) > 1:
            lines.append(f"    \\multicolumn{{{columns}}}{{l}}{{\\emph{{{case}}}}} \\\\")
        lines += [f"    {_begun(name)} & {' & '.join(cells)} \\\\" for name, cells in rows]
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _begun(name: str) -> str:
    r"""A row's first cell, which the ``\\`` of the row before does not take for its own ``*`` or ``[``."""
    return f"{{}}{name}" if name[:1] in ("*", "[") else name


def _label(table: PaperTable) -> str:
    """Letters, digits and hyphens: ``unstructured-one-shot``, ``2-4-fine-tuned``."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{table.structure}-{'fine-tuned' if table.epochs else 'one-shot'}").strip("-")
