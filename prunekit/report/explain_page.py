"""An explanation as one self-contained page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prunekit.explain.pictures import Pictures
from prunekit.report.html import write_html
from prunekit.report.measures import shown
from prunekit.report.plots import heat_map, inline, logarithmic

SHOWN = 20  # groups in a plot


def write_explanation(path: Path, result: Mapping[str, Any], pictures: Pictures) -> None:
    """Writes the page of an explanation (see ``prunekit.explain``), whole or not at all."""
    write_html(
        path, "explain.html.j2", e=result, measures=shown(result.get("measures")), pictures=pictures, plots=plots_of(result)
    )


def plots_of(result: Mapping[str, Any]) -> dict[str, str]:
    """An explanation's plots as data addresses by name."""
    return {name: inline(figure) for name, figure in _figures(result).items()}


def _figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    if result["what"] == "pruned":
        found = {"blame": blame_figure({k: m for k in ("before", "after") if (m := result[k]) is not None})}
        return found | ({"rounds": rounds_figure(result["refine"]["history"])} if result["refine"] else {})
    if result["what"] == "errors":
        return {}
    if result["what"] == "ranking":
        return {"layers": layers_figure(result["layers"])}
    if "masks" in result:
        return {"blame": blame_figure({mask["name"]: mask for mask in result["masks"]})}
    if result["what"] == "diff":
        return {"groups": groups_figure(result)} if result["changes"] else {}
    found = {"steps": steps_figure(result), **({"classes": classes_figure(result)} if result["classes"] else {})}
    steps, each = result["steps"], _each(result)
    if len(steps["classes"]) > 1:
        rows = [f"{each} {c}" for c in steps["classes"]]
        what = "moved the class's output by" if each == "class" else "moved it by"
        found["class_steps"] = heat_map(rows, _times(steps["phases"]), _summed(steps), "training steps", what)
    if "layers" in result:
        found["layers"] = layers_figure(result["layers"])
    return found


def steps_figure(result: Mapping[str, Any]) -> Figure:
    """What was contributed up to each step, by the kernel share, the regularisation share, and together."""
    steps = result["steps"]
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    panel = figure.subplots()
    kernel, regularisation = steps["kernel"], steps["regularisation"]
    both = [a + b for a, b in zip(kernel, regularisation, strict=True)]
    lines = [("kernel", kernel, "--", "#0072B2"), ("regularisation", regularisation, ":", "#D55E00"),
             ("together", both, "-", "#000000")]  # fmt: skip
    for label, values, style, colour in lines if any(regularisation) else lines[2:]:
        panel.plot(steps["first"], list(accumulate(values)), linestyle=style, color=colour, linewidth=1.4, label=label)
    panel.axhline(0, color="#999999", linewidth=0.8)
    panel.set_xlabel("training step")
    panel.set_ylabel("contribution so far")
    panel.legend(fontsize=8, frameon=False)
    panel.grid(alpha=0.25)
    return figure


def classes_figure(result: Mapping[str, Any]) -> Figure:
    """Contribution to each class's output: on the class's own samples, and on all others. Without classes, to each output."""
    rows = sorted(result["classes"], key=lambda row: int(row["class"]))[:50]
    own = [row.get("own", row.get("kernel", 0.0) + row.get("regularisation", 0.0)) for row in rows]
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    panel = figure.subplots()
    places = list(range(len(rows)))
    two = any("others" in row for row in rows) and _each(result) == "class"
    width = 0.4 if two else 0.7
    label = "on samples of the class" if two else "contribution"
    panel.bar([p - width / 2 if two else p for p in places], own, width, color="#0072B2", label=label)
    if two:
        others = [row["others"] for row in rows]
        panel.bar([p + width / 2 for p in places], others, width, color="#E69F00", hatch="///", label="on all other samples")
        panel.legend(fontsize=8, frameon=False)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(places, [str(row["class"]) for row in rows], fontsize=8)
    panel.set_xlabel(_each(result))
    panel.set_ylabel("moved its output by" if _each(result) == "class" else "moved it by")
    panel.grid(alpha=0.25, axis="y")
    return figure


def layers_figure(layers: Mapping[str, Any]) -> Figure:
    """Layer × phase of training: what moved the explained output, kernel and regularisation together."""
    rows = layers["rows"]
    values = [[p["kernel"] + p["regularisation"] for p in row["phases"]] for row in rows]
    return heat_map([row["layer"] for row in rows], _times(rows[0]["phases"]), values, "training steps", "moved the output by")


def groups_figure(result: Mapping[str, Any]) -> Figure:
    """The most blamed groups, mean over the changed samples."""
    rows = result["groups"][:SHOWN]
    figure = Figure(figsize=(7.5, 0.9 + 0.26 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.barh([row["name"] for row in rows], [row["blame"] for row in rows], color="#BBCCEE", edgecolor="black")
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.8)
    if "task" in result:
        panel.set_xlabel("moved away from the dense outputs by (mean over the samples that moved furthest)")
    else:
        panel.set_xlabel("pushed from the dense answer to the pruned one by (mean over changed samples)")
    panel.tick_params(labelsize=8)
    return figure


def rounds_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Divergence after every round of a refinement, on the samples it learnt from and on those that accepted."""
    taken = [entry for entry in history if entry["kept"]]
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    panel = figure.subplots()
    places = list(range(len(taken)))
    lines = (("learn", "--", "o", "#D55E00", "samples learnt from"), ("accept", "-", "s", "#0072B2", "samples that accept"))
    for key, line, marker, colour, label in lines:
        values = [entry[key] for entry in taken]
        panel.plot(places, values, linestyle=line, marker=marker, color=colour, markersize=3.5, linewidth=1.4, label=label)
    stages = {"given": "given", "refine": "{round}", "learn": "learn {round}"}
    names = [stages.get(entry["stage"], "{stage} {round}").format(**entry) for entry in taken]
    shown = places[:: max(1, len(places) // 16)]
    panel.set_xticks(shown, [names[k] for k in shown], fontsize=7, rotation=30, ha="right")
    if all(entry[key] > 0 for entry in taken for key in ("learn", "accept")):
        logarithmic(panel)
    panel.set_xlabel("step of learning, or round of swaps, whose mask was taken")
    panel.set_ylabel("divergence")
    panel.legend(fontsize=8, frameon=False)
    panel.grid(alpha=0.25)
    return figure


def blame_figure(masks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Blame by layer, and by class where there are classes: one bar a mask, named by its key."""
    first = next(iter(masks.values()))
    kinds = [("layers", "layer"), *([("classes", "class")] if first.get("classes") else [])]
    rows = {kind: [k for k in range(len(first[kind])) if any(m[kind][k]["blame"] for m in masks.values())] for kind, _ in kinds}
    figure = Figure(figsize=(7.5, 1.1 + 0.3 * min(SHOWN, max(map(len, rows.values())))), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    width = 0.8 / len(masks)
    for panel, (kind, key) in zip(panels, kinds, strict=True):
        sizes = {k: max(abs(m[kind][k]["blame"]) for m in masks.values()) for k in rows[kind]}
        shown = sorted(sorted(sizes, key=sizes.__getitem__, reverse=True)[:SHOWN])
        for number, ((name, mask), hatch) in enumerate(zip(masks.items(), ("///", ""), strict=False)):
            places = [k + (number - (len(masks) - 1) / 2) * width for k in range(len(shown))]
            colour = ("#E69F00", "#0072B2")[number]
            panel.barh(places, [mask[kind][k]["blame"] for k in shown], width, color=colour, hatch=hatch, label=name)
        panel.set_yticks(range(len(shown)), [str(first[kind][k][key]) for k in shown], fontsize=8)
        panel.set_ylabel(key)
        panel.invert_yaxis()
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xlabel("blame, parts of the divergence")
        panel.locator_params(axis="x", nbins=4)  # half a figure's width has no room for more
        panel.grid(alpha=0.25, axis="x")
    if len(masks) > 1:
        panels[-1].legend(fontsize=8, frameon=False)
    return figure


def _each(result: Mapping[str, Any]) -> str:
    return "output" if "target" in result else "class"


def _times(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{p['begin']}–{p['end'] - 1}" for p in phases]


def _summed(steps: Mapping[str, Any]) -> list[list[float]]:
    """``(classes, phases)`` from contributions by step and class."""
    found = []
    for k in range(len(steps["classes"])):
        values = dict(zip(steps["first"], (row[k] for row in steps["by_class"]), strict=True))
        found.append([sum(v for s, v in values.items() if p["begin"] <= s < p["end"]) for p in steps["phases"]])
    return found
