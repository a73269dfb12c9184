"""Which parts of the transformer learn when: influence by component over training, kernel against decay, layers swapped."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prunekit.kernel import ModelFunction
from prunekit.kernel.gradients import choose_engine
from prunekit.measure import accuracy
from prunekit.training.record import TrainingRecord
from prunekit.trajectory import Segment
from prunekit.verbs.run_folder import Run

from .common import COMPONENTS, function_of, note, table, trained

CASE = "modadd-transformer"
CHUNK = 4  # samples whose scores on all outputs are held at a time, 41 MB each
LEARNT = 0.98  # accuracy from which a split counts as learnt
OUTER = {
    "embedding, MLP out, decoder": ("embedding", "MLP out", "decoder"),
    "embedding, decoder": ("embedding", "decoder"),
    "MLP out, decoder": ("MLP out", "decoder"),
    "embedding": ("embedding",),
    "decoder": ("decoder",),
    "attention, MLP in": ("attention", "MLP in"),
}
"""What is taken from another time than the rest; the first and the last are each other's complement."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=8, help="validation samples, all outputs each (the paper: 2000)")
    parser.add_argument("--window", type=int, default=50, help="steps whose contributions are added up (the paper: 50)")
    parser.add_argument("--stride", type=int, default=1, help="steps taken as one straight piece (the paper: 1)")
    parser.add_argument("--lines", type=int, default=18, help="lines of each table over time")


def run(chosen: argparse.Namespace) -> str:
    case = trained(CASE, chosen.out)
    accuracies = TrainingRecord.load(case.path / "train.json").accuracies
    learnt = {split: next(row["epoch"] for row in accuracies if row[split] >= LEARNT) for split in ("train", "validation")}
    text = (
        f"Training accuracy reaches {LEARNT:.0%} at epoch {learnt['train']}, validation accuracy at {learnt['validation']}, "
        f"looked at every {accuracies[0]['epoch']} epochs; training ended after {len(case.trajectory)}, at "
        f"{accuracies[-1]['validation']:.2%} on validation data.\n"
    )
    return text + over_time(case, chosen) + swapped(case, chosen)


# -- influence by component ---------------------------------------------------------------------------------------------


def over_time(case: Run, chosen: argparse.Namespace) -> str:
    """Absolute contributions of each component in each window of training."""
    function = function_of(case)
    x, y = case.splits["validation"].batch(range(chosen.samples))
    xs, ys = case.splits["validation"].batch(range(len(case.splits["validation"])))
    windows = list(contributions(function, case.trajectory.segments(chosen.stride), x, y, chosen.window))
    shown = evenly(len(windows), chosen.lines)
    shares, ratios = [], []
    for number in shown:
        begin, kernel, decay = windows[number]
        end = min(begin + chosen.window, len(case.trajectory))
        with torch.no_grad():
            right = accuracy(function(case.trajectory.state(end), xs, ys), ys)
        head = [f"{begin}–{end}", f"{100 * right:.1f}"]
        total = sum(kernel.values())
        shares.append([*head, *(f"{100 * kernel[name] / total:.1f}" for name in COMPONENTS), f"{total:.0f}"])
        ratios.append([
            *head, *(f"{kernel[name] / decay[name]:.2f}" for name in COMPONENTS), f"{total / sum(decay.values()):.2f}",
        ])  # fmt: skip
    header = ("steps", "validation accuracy at the end, %", *COMPONENTS)
    return (
        f"\nShare of influence, %: Σ|ψ| of a component's weights over all components', kernel share, windows of {chosen.window} "
        f"steps (pieces of {chosen.stride}, one node), {chosen.samples} validation samples × all log-probabilities; one window "
        f"in {shown.step} is shown.\n\n"
        + table((*header, "Σ of all"), shares)
        + "\nKernel against weight decay: Σ|ψ| of the kernel share over that of the regularisation share, same windows.\n\n"
        + table((*header, "all"), ratios)
    )


def contributions(
    function: ModelFunction, segments: Iterator[Segment], x: Tensor, y: Tensor, window: int
) -> Iterator[tuple[int, dict[str, float], dict[str, float]]]:
    """Of every window: its first step, and ``Σ_x Σ_c |ψ|`` by component, of kernel and of regularisation."""
    inside: list[Segment] = []
    for segment in segments:
        if inside and segment.index // window != inside[0].index // window:
            yield inside[0].index, *one_window(function, inside, x, y)
            inside = []
        inside.append(segment)
    yield inside[0].index, *one_window(function, inside, x, y)


def one_window(function: ModelFunction, pieces: list[Segment], x: Tensor, y: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    layout = function.layout
    engine = choose_engine(function, pieces[0].start, x, y)
    sums: tuple[dict[str, float], dict[str, float]] = (dict.fromkeys(COMPONENTS, 0.0), dict.fromkeys(COMPONENTS, 0.0))
    for begin in range(0, len(x), CHUNK):
        some, labels = x[begin : begin + CHUNK], y[begin : begin + CHUNK]
        with torch.no_grad():
            targets = function(pieces[0].start, some, labels).shape[1]
        for which, moved in enumerate(("data_update", "regularisation")):
            total = {e.name: pieces[0].start.new_zeros(len(some), targets, *e.shape) for e in layout.parameters}
            for piece in pieces:
                scale = layout.views(getattr(piece, moved))
                engine.accumulate(torch.lerp(piece.start, piece.end, 0.5), some, labels, scale, total)
            for component, members in COMPONENTS.items():
                sums[which][component] += sum(float(total[name].abs().sum()) for name in members)
    note(f"steps from {pieces[0].index}: done")
    return sums


# -- layers of two times in one model -----------------------------------------------------------------------------------


def swapped(case: Run, chosen: argparse.Namespace) -> str:
    """Validation accuracy of models whose named layers are the trained ones', the rest of an earlier time."""
    function = function_of(case)
    x, y = case.splits["validation"].batch(range(len(case.splits["validation"])))
    final = case.trajectory.state(-1)

    def right(state: Tensor) -> float:
        with torch.no_grad():
            return 100 * accuracy(function(state, x, y), y)

    rows = []
    for number in evenly(len(case.trajectory) // chosen.window, chosen.lines):
        step = number * chosen.window
        early = case.trajectory.state(step)
        models = [with_layers(function, early, final, OUTER[names]) for names in OUTER]
        rows.append([str(step), f"{right(early):.1f}", *(f"{right(model):.1f}" for model in models)])
    return (
        f"\nLayers of the trained model put into the model of an earlier step: accuracy in % on {len(x)} validation samples. A "
        "column names the layers that are the trained model's; everything else is the step's own.\n\n"
        + table(("step", "nothing swapped", *OUTER), rows)
    )


def with_layers(function: ModelFunction, base: Tensor, other: Tensor, components: tuple[str, ...]) -> Tensor:
    """``base`` with the named components of ``other``."""
    views: Mapping[str, Tensor] = function.layout.views(other)
    state = base.clone()
    for name, view in function.layout.views(state).items():
        if any(name in COMPONENTS[component] for component in components):
            view.copy_(views[name])
    return state


def evenly(count: int, lines: int) -> range:
    """At most ``lines`` numbers below ``count``, evenly spaced from 0."""
    return range(0, count, -(-count // lines))
