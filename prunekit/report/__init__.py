"""Tables, plots and pages that show artifacts; nothing is computed here."""

from prunekit.report.explain_page import write_explanation
from prunekit.report.page import write_page
from prunekit.report.plots import comparison_figure, save_figure, sensitivity_figure
from prunekit.report.study import study_figure, write_study_page
from prunekit.report.tables import accuracy_tables

__all__ = [
    "accuracy_tables", "comparison_figure", "save_figure", "sensitivity_figure", "study_figure", "write_explanation",
    "write_page", "write_study_page",
]  # fmt: skip
