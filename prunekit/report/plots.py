"""Pictures: the deciding measure against sparsity, one line per criterion, readable in black and white."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib

matplotlib.use("Agg")
if Path(matplotlib.matplotlib_fname()).resolve().parent == Path.cwd().resolve():
    matplotlib.rcdefaults()  # a matplotlibrc in the folder one works in, which may be a run folder, sets no pictures of ours

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

from prunekit.durable import replacing
from prunekit.explain.account import Account
from prunekit.report.measures import Shown, deciding
from prunekit.search.compare import Comparison
from prunekit.search.sensitivity import Sensitivity

# Line style and marker tell criteria apart without colour; the colours are Okabe-Ito's, safe for colour blindness.
STYLES = [
    ("-", "o", "#0072B2"),
    ("--", "s", "#D55E00"),
    (":", "^", "#009E73"),
    ("-.", "D", "#CC79A7"),
    ((0, (3, 1, 1, 1, 1, 1)), "v", "#56B4E9"),
    ((0, (5, 1)), "P", "#E69F00"),
    ((0, (1, 1)), "X", "#000000"),
]
REPAIRED = ("-", "*", "#000000")


def comparison_figure(comparison: Comparison) -> Figure:
    """A panel for every structure × allocation: the deciding measure on validation data over achieved sparsity.

    Repaired plans, which start from the best allocation, are one line in every panel of their structure.
    """
    own, measure = comparison.unrepaired, deciding(comparison.measures)
    structures = _ordered(cell["structure"] for cell in own)
    allocations = _ordered(cell["allocation"] for cell in own)
    criteria = _ordered(cell["criterion"] for cell in own)
    figure = Figure(figsize=(4.6 * len(allocations), 3.4 * len(structures)), layout="constrained")
    axes = figure.subplots(len(structures), len(allocations), squeeze=False, sharey=True)
    for row, structure in zip(axes, structures, strict=True):
        for panel, allocation in zip(row, allocations, strict=True):
            here = [c for c in own if (c["structure"], c["allocation"]) == (structure, allocation)]
            if not here:
                panel.set_axis_off()  # N:M is the same in every allocation
                continue
            for criterion, style in zip(criteria, cycle(STYLES)):
                _curve(panel, measure, [c for c in here if c["criterion"] == criterion], criterion, style)
            if repaired := [c for c in comparison.cells if c["repair"] and c["structure"] == structure]:
                _curve(panel, measure, repaired, "refined, from the best", REPAIRED, linewidth=2.2, markersize=8)
            if measure.name in comparison.dense:
                panel.axhline(measure.scale * comparison.dense[measure.name], color="black", linewidth=0.9, label="dense model")
            panel.set_title(f"{structure}, {allocation}", fontsize=10)
            panel.grid(alpha=0.25)
            if measure.unit == "%":
                panel.set_ylim(0, 103)
    for panel in axes[-1]:
        panel.set_xlabel("sparsity: prunable parameters removed (%)")
    for row in axes:
        row[0].set_ylabel(f"validation {measure.axis}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9, frameon=False)
    return figure


def _curve(
    panel: Any,
    measure: Shown,
    cells: Sequence[dict[str, Any]],
    label: str,
    style: Any,
    linewidth: float = 1.4,
    markersize: float = 4.5,
) -> None:
    line, marker, colour = style
    cells = sorted(cells, key=lambda c: float(c["achieved"]))
    x, y = ([scale * c[key] for c in cells] for key, scale in (("achieved", 100), (measure.name, measure.scale)))
    panel.plot(
        x, y, linestyle=line, marker=marker, color=colour, linewidth=linewidth, markersize=markersize, label=label
    )  # fmt: skip


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary:
        _write_png(figure, temporary, dpi=130)


def inline(figure: Figure) -> str:
    """The figure as a data address for a page that needs no other file."""
    buffer = io.BytesIO()
    _write_png(figure, buffer, dpi=110)
    return data_address(buffer.getvalue())


def _write_png(figure: Figure, target: Path | BinaryIO, dpi: int) -> None:
    """Draws once; ``savefig`` draws a constrained layout twice, first to lay it out."""
    figure.set_dpi(dpi)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names of criteria and measures are the user's, dollars included
    with matplotlib.rc_context({"text.parse_math": False}):  # of ticks, which are made while it is drawn
        FigureCanvasAgg(figure).print_png(target)


def data_address(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def layers_figure(accounts: Mapping[str, Account]) -> Figure:
    """For each pruned model, what share of the outputs' change came through each layer."""
    rows = sum(len(account["pruned"]["by_layer"]) for account in accounts.values())
    figure = Figure(figsize=(7, 0.8 + 0.32 * rows), layout="constrained")
    axes = figure.subplots(len(accounts), 1, squeeze=False, sharex=True)
    hatches = ["", "///", "...", "xxx"]
    for number, (panel, (name, account)) in enumerate(zip(axes[:, 0], accounts.items(), strict=True)):
        layers = account["pruned"]["by_layer"]
        panel.barh(
            list(layers), [100 * v["share"] for v in layers.values()],
            color="#BBCCEE", edgecolor="black", hatch=hatches[number % len(hatches)],
        )  # fmt: skip
        panel.invert_yaxis()
        panel.set_title(name, fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("share of the outputs' change (%)")
    return figure


def sensitivity_figure(found: Sensitivity) -> Figure:
    """The deciding measure by layer (rows) and sparsity (columns), as shades with the figures in them."""
    measure = deciding(found.measures)
    layers, sparsities = _ordered(c["layer"] for c in found.cells), sorted({c["sparsity"] for c in found.cells})
    table = {(c["layer"], c["sparsity"]): measure.scale * c[measure.name] for c in found.cells}
    rows = [[table[layer, sparsity] for sparsity in sparsities] for layer in layers]
    figure = Figure(figsize=(2.4 + 0.62 * len(sparsities), 1.3 + 0.34 * len(layers)), layout="constrained")
    panel = figure.subplots()
    percent = measure.unit == "%"
    every = [value for row in rows for value in row]
    low, high = (0.0, 100.0) if percent else (min(every), max(every))
    good = measure.sign > 0
    image = panel.imshow(rows, cmap="cividis" if good else "cividis_r", vmin=low, vmax=high, aspect="auto")
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            bright = value > low + 0.55 * (high - low) if good else value < low + 0.45 * (high - low)
            text = f"{value:.0f}" if percent else f"{value:.2g}"
            _in_cell(panel, column, row, text, 8, "black" if bright else "white")
    panel.set_xticks(range(len(sparsities)), [f"{100 * s:g}" for s in sparsities])
    panel.set_yticks(range(len(layers)), layers, fontsize=8)
    panel.set_xlabel("share of this layer removed (%), all others whole")
    made = found.made_from
    dense = f"; dense {measure.spaced(found.dense[measure.name])}" if measure.name in found.dense else ""
    panel.set_title(f"{made['structure']} by {made['criterion']}{dense}", fontsize=9, loc="left")
    figure.colorbar(image, label=f"validation {measure.axis}")
    return figure


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], along: str, what: str) -> Figure:
    """Signed values by row and column, white at 0; figures inside where there is room for them."""
    figure = Figure(figsize=(2.2 + 0.62 * len(columns), 1.4 + 0.34 * len(rows)), layout="constrained")
    panel = figure.subplots()
    largest = max((abs(v) for row in values for v in row), default=0.0) or 1.0
    image = panel.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    if len(columns) <= 16:
        for row, numbers in enumerate(values):
            for column, value in enumerate(numbers):
                colour = "white" if abs(value) > 0.6 * largest else "black"
                _in_cell(panel, column, row, f"{value:.2g}", 7, colour)
    shown = range(0, len(columns), max(1, len(columns) // 16))
    panel.set_xticks(list(shown), [columns[i] for i in shown], fontsize=7, rotation=30, ha="right")
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
    panel.set_xlabel(along)
    figure.colorbar(image, label=what)
    return figure


def _in_cell(panel: Axes, column: int, row: int, text: str, size: int, colour: str) -> None:
    written = panel.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    written.set_in_layout(False)  # it lies inside its panel, so measuring it tells the layout nothing


class PlainNumbers(LogFormatterSciNotation):
    """Labels the ticks that matplotlib would, but ``2.2``, not ``2.2 × 10⁰``: typesetting that takes longer than the plot."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.6g}" if super().__call__(x, pos) else ""


def logarithmic(panel: Axes) -> None:
    """Makes the upright axis of ``panel`` logarithmic."""
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(PlainNumbers())
    panel.yaxis.set_minor_formatter(PlainNumbers())


def training_figure(losses: list[float]) -> Figure:
    """Mean training loss by epoch."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    panel = figure.subplots()
    panel.plot(range(1, len(losses) + 1), losses, color="black", marker="o", markersize=3)
    panel.set_xlabel("epoch")
    panel.set_ylabel("training loss")
    if all(loss > 0 for loss in losses):  # a log-likelihood may be below 0
        logarithmic(panel)
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    panel.grid(alpha=0.25)
    return figure


def _ordered(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
