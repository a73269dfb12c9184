"""Tables, plots, pages; the kernel's account of a pruned model."""

from prunekit.report.account import account, dense_reconstruction
from prunekit.report.page import accuracy_tables, write_page
from prunekit.report.plots import comparison_figure, save_figure, sensitivity_figure
from prunekit.report.study import study_figure, write_study_page

__all__ = [
    "account", "accuracy_tables", "comparison_figure", "dense_reconstruction", "save_figure", "sensitivity_figure",
    "study_figure", "write_page", "write_study_page",
]  # fmt: skip
