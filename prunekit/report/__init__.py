"""Tables, plots, pages; the kernel's account of a pruned model; explanations."""

from prunekit.report.account import account, dense_reconstruction
from prunekit.report.diff import explain_diff
from prunekit.report.explain import PrunedPath, Training, explain_part, explain_sample, explain_training_sample
from prunekit.report.explain_page import write_explanation
from prunekit.report.page import accuracy_tables, write_page
from prunekit.report.parts import Part, find_part
from prunekit.report.plots import comparison_figure, save_figure, sensitivity_figure
from prunekit.report.removal import Damage, explain_removal, explain_removals, flat_mask, units_of
from prunekit.report.study import study_figure, write_study_page
from prunekit.report.timeline import timeline
from prunekit.report.view import View

__all__ = [
    "Damage", "Part", "PrunedPath", "Training", "View", "account", "accuracy_tables", "comparison_figure", "dense_reconstruction",
    "explain_diff", "explain_part", "explain_removal", "explain_removals", "explain_sample", "explain_training_sample",
    "find_part", "flat_mask", "save_figure", "sensitivity_figure", "study_figure", "timeline", "units_of", "write_explanation",
    "write_page", "write_study_page",
]  # fmt: skip
