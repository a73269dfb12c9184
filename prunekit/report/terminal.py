"""What a verb prints for people: short tables on stdout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunekit.explain.answers import text_of
from prunekit.plan import GROUPED
from prunekit.report.measures import Shown, by_name, deciding, shown
from prunekit.report.page import accuracy_tables, trained
from prunekit.search.compare import Comparison

SIZES = {
    "parameters": "parameters",
    "nonzero": "non-zero parameters",
    "macs": "theoretical MACs",
    "bytes": "bytes on disk",
}
LEARNT = 0.98
"""The accuracy whose first epoch is told of a watched training: of memorising, and of generalising."""


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width; the default of 80 would break rows
    if table.title:
        print(table.title)  # not the table's own: that is wrapped to the table's width
        table.title = None
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _again(reused: bool) -> str:
    return " (unchanged, reused)" if reused else ""


def train(result: dict[str, Any]) -> None:
    found, told = trained(result), f"train: {result['steps']} steps in {result['cost']['seconds']:.1f} s"
    if found is not None:
        measure, figures = found
        train, validation = (measure.spaced(figures[split]).replace(" %", "%") for split in ("train", "validation"))
        told += f", {measure.title} {train} on training, {validation} on validation data"
    print(f"{told}{_again(result['reused'])}")
    if (watched := result.get("accuracies")) and result["accuracy"] is not None:
        print(
            f"  {LEARNT:.0%} right: training data {_reached(watched, 'train')}, validation data {_reached(watched, 'validation')}"
        )


def _reached(watched: list[dict[str, float]], split: str) -> str:
    first = next((row["epoch"] for row in watched if row[split] >= LEARNT), None)
    return "never" if first is None else f"at epoch {first}"


def imported(result: dict[str, Any]) -> None:
    kind = (
        f"a path of {result['states']} checkpoints" if result["path"] else "one checkpoint (no path: influence needs two or more)"
    )
    task = f", task {result['task']}" if result["task"] else ""
    print(f"import: {result['coordinates']:,} coordinates, {kind}{task}{_again(result['reused'])}")


def score(results: list[dict[str, Any]]) -> None:
    for r in results:
        error = r["findings"].get("error")
        note = f", estimated relative error {error['relative']:.2g}" if error else ""
        print(f"score: {r['criterion']} in {r['seconds']:.2f} s{note} -> {r['path']}{_again(r['reused'])}")
        if uncovered := r["findings"].get("uncovered"):
            listed = ", ".join(f"{name} {count:,}" for name, count in uncovered.items())
            print(f"  no scoring sample touches these weights, so they rank last for want of evidence: {listed}")
        if skipped := r["findings"].get("by_magnitude"):
            listed = ", ".join(f"{name} ({why})" for name, why in skipped["parameters"].items())
            scale = f", times {skipped['scale']:.3g}"
            print(f"  scored by magnitude{scale}, since {r['criterion']} has nothing to look at there: {listed}")


def compare(result: tuple[Comparison, bool]) -> None:
    comparison, reused = result
    measure = deciding(comparison.measures)
    dense = f"dense {measure.number(comparison.dense[measure.name])}; " if measure.name in comparison.dense else ""
    for found in accuracy_tables(comparison):
        table = _table(
            f"compare, {found['structure']}: validation {_in(measure)} ({dense}"
            "* best criterion at that sparsity)",
            "criterion", "allocation", *(f"{s:g}" for s in found["sparsities"]),
        )  # fmt: skip
        for (criterion, allocation), cells in found["rows"].items():
            marks = [f"{measure.number(c[measure.name])}{'*' if c['best'] else ' '}" if c else "" for c in cells]
            table.add_row(criterion, allocation, *marks)
        _print(table)
    if reused:
        print("compare: unchanged, reused")


def _in(measure: Shown) -> str:
    """``accuracy in %``, ``RMSE ↓``."""
    return f"{measure.title} in {measure.unit}" if measure.unit else measure.title


def study(result: dict[str, Any]) -> None:
    measure = deciding(result.get("measures"))
    points = ", in points" if measure.unit == "%" else ""
    digits = ".2f" if points else ".4g"
    table = _table(f"compare: area under the curve of test {measure.title}{points}, mean ± standard deviation over seeds",
                   "case, structure", "auto", "regret", "best criterion", "", "magnitude")  # fmt: skip
    for e in result["summary"]:
        best = max(e["methods"], key=lambda m: measure.sign * e["methods"][m]["mean"])
        magnitude = e["methods"].get("magnitude")
        table.add_row(
            f"{e['case']}, {e['structure']}", _points(e["auto"], digits), _points(e["auto"]["regret"], digits), best,
            _points(e["methods"][best], digits), _points(magnitude, digits) if magnitude else "",
        )  # fmt: skip
    _print(table)
    if len(result["study"]["seeds"]) < 3:
        print("  fewer than three seeds: no claim about criteria can rest on this")
    print(f"compare: {result['rows']:,} pruned models -> {result['path']}")


def _points(found: dict[str, Any], digits: str) -> str:
    return f"{found['mean']:{digits}}" + ("" if found["std"] is None else f" ± {found['std']:{digits}}")


def prune(result: dict[str, Any]) -> None:
    what = "plan" if result.get("dry_run") else "prune"
    notes = (" (plan edited by hand)" if result["edited"] else "") + (", compensated" if result["compensated"] else "")
    print(
        f"{what}: {result['name']}: {result['structure']} by {result['criterion']} ({result['allocation']}), "
        f"{'found' if result['budget'] else 'asked'} {result['asked']:.4f}, removed {result['achieved']:.4f} of prunable and "
        f"{result['achieved_all']:.4f} of all parameters{notes} -> {result['path']}{_again(result['reused'])}"
    )
    if result["budget"]:
        print(f"  {_budget(result)}")
    if result["missed"]:
        print(f"  {result['missed']}")
    if result["classes"]:
        print(f"  for classes {', '.join(map(str, result['classes']))}: scored, chosen and validated on their samples alone")
    if result["by_auto"] and result["criterion"] == "random":
        print("  random did best on validation data: so much removed at once, no criterion knows better than chance here")
    if refined := result["refine"]:
        before, after = refined["before"]["accept"], refined["after"]["accept"]
        many = sum("again" not in found for found in result.get("rounds", ())) > 1
        where = ", last round" if many else ""
        print(
            f"  refined{where}: divergence {before:.4g} -> {after:.4g} on samples of their own, {refined['changed']:,} of "
            f"{refined['kept']:,} kept {_kept_of(result['structure'])} are others than before{_ENDS[refined['ended']]}"
        )
        if "note" in refined:
            print(f"  {refined['note']}")
    for number, refined in enumerate(result["refined_again"], 1):
        print(f"  {_refined_again(number, refined)}")
    if tried := result["refine_tried"]:
        print(f"  {_tried(tried)}")
    if result["compensation_note"]:
        print(f"  compensated {result['compensation_note']}")
    if squeezed := result["squeezed"]:
        listed = ", ".join(f"{name} {count}" for name, count in squeezed["removed"].items()) or "none"
        print(f"  squeezed: channels taken out: {listed}")
        for name, why in squeezed["left"].items():
            print(f"  {name}: {why}")
    for number, found in enumerate(result.get("rounds", ()), 1):
        told = f"  round {number}{', refined again' if 'again' in found else ''}: removed {found['sparsity']:.4f}"
        if repaired := found.get("refined"):
            told += f", divergence {repaired['before']['accept']:.4g} -> {repaired['after']['accept']:.4g} by refining"
        if name := next((key.removesuffix("_pruned") for key in found if key.endswith("_pruned")), ""):
            measure = by_name(name)
            told += f", validation {measure.title} {measure.text(found[f'{name}_pruned'])}"
            told += (
                f", after {found['steps']} step{'s' * (found['steps'] != 1)} {measure.text(found[name])}"
                if found["steps"]
                else ""
            )
        print(f"{told} ({found['seconds']:.1f} s)")
    if result.get("recalibrated") == 0:
        print("  recalibrate: the model has no BatchNorm layer, so there was nothing to measure anew")
    table = _table("", "parameter", "weights", "kept", "kept %")
    for name, count in result["layers"].items():
        table.add_row(name, f"{count['total']:,}", f"{count['kept']:,}", f"{100 * count['kept'] / count['total']:.1f}")
    _print(table)
    emptied = [name for name, count in result["layers"].items() if count["total"] and not count["kept"]]
    if emptied and result["structure"] != "layers":  # a block that leaves is passed by
        print(f"  nothing is left of {', '.join(emptied)}: what follows gets nothing from there (--floor keeps a share of each)")
    if result["groups"]:
        table = _table("", "blocks" if result["structure"] == "layers" else "units of", "before", "kept")
        for name, count in sorted(result["groups"].items()):
            table.add_row(name, str(count["total"]), str(count["kept"]))
        _print(table)
    for name, reason in result["refused"].items():
        print(f"  left whole: {name}: {reason}")


def _kept_of(structure: str) -> str:
    """What a plan of ``structure`` counts as kept."""
    return structure if structure in GROUPED else "weights"


def _budget(result: dict[str, Any]) -> str:
    """One line on a budget, and how far the plan goes towards it."""
    ((name, asked),) = result["budget"].items()
    option = f"--{name.replace('_', '-')} {asked:,g}"
    if "standard_error" not in result:
        return f"{option}: the plan comes to {result['reached']:,.6g}"
    measure = by_name(result.get("measure", "accuracy"))
    points = " points of" if measure.unit == "%" else " of"
    return f"{option}: loses {result['reached']:.3g} ± {result['standard_error']:.2g}{points} {measure.plain} on validation data"


def _refined_again(number: int, refined: dict[str, Any]) -> str:
    """One line on a refinement after fine-tuning."""
    before, after = refined["before"]["accept"], refined["after"]["accept"]
    back, out = (sum(moved[way] for moved in refined["moved"].values()) for way in ("back", "out"))
    return (
        f"refined again after fine-tuning ({number}): divergence {before:.4g} -> {after:.4g}, {back:,} came back, {out:,} went"
        f"{_ENDS[refined['ended']]}"
    )


def _tried(tried: dict[str, Any]) -> str:
    """One line on a refinement that was to be taken only if it is better."""
    if "why" in tried:
        return f"refine not tried: {tried['why']}"
    before, after = tried["unrefined"], tried["refined"]
    measures = [by_name(name) for name in before]
    told = ", ".join(f"{m.brief} {m.text(before[m.name])} -> {m.text(after[m.name])}" for m in measures)
    if tried["kept"]:
        return f"refine tried: taken, better on validation data ({told})"
    return f"refine tried: not taken, no better on validation data ({told}){_ENDS[tried['ended']]}"


_ENDS = {"done": "", "budget": ", until the budget was spent", "interrupted": ", interrupted: the best so far"}


def evaluate(result: tuple[str, dict[str, Any]]) -> None:
    name, e = result
    others = {"before squeezing": e["masked"]} if "masked" in e else {}
    small = {**others, "pruned": e["pruned"]}
    models = {"dense": e["dense"], **small}
    between = [""] * len(others)
    table = _table(f"eval: {name}, {e['test_samples']} test samples{_again(e['reused'])}", "", *models)
    measures = shown(e.get("measures"))
    for measure in measures:
        told = ["", *small.values()] if measure.close else models.values()
        table.add_row(measure.label, *(measure.text(found[measure.name]) if found else "" for found in told))
    table.add_row("sparsity, prunable / all", "", *between, f"{e['sparsity']['prunable']:.4f} / {e['sparsity']['all']:.4f}")
    if asked := e.get("asked_classes"):
        first = measures[0]
        for key, what in (("on_classes", f"{first.title} on classes {', '.join(map(str, asked['classes']))}"),
                          ("on_others", f"{first.title} on the others")):  # fmt: skip
            if key in asked:
                table.add_row(what, first.text(asked[key]["dense"]), *between, first.text(asked[key][first.name]))
    for key, label in SIZES.items():
        table.add_row(label, *(f"{found[key]:,}" for found in models.values()))
    for size, times in e["latency"]["batches"].items():
        measured = ("dense_ms", *(["masked_ms"] if others else []), "pruned_ms")
        table.add_row(f"latency, batch {size} (ms)", *(f"{times[key]:.2f}" for key in measured))
    _print(table)
    if refined := e.get("refine"):
        before, after = refined["before"]["accept"], refined["after"]["accept"]
        later = [f"{a['before']['accept']:.4g} -> {a['after']['accept']:.4g}" for a in refined.get("again", ())]
        print(f"refined: divergence {'; after fine-tuning '.join([f'{before:.4g} -> {after:.4g}', *later])}")
    kernel = e["kernel"]
    if kernel is None:
        print("kernel: this run has one checkpoint, so there is no path to rebuild the model from")
        return
    table = _table(f"kernel, {kernel['samples']} test samples", "", "dense rebuilt", "pruned rebuilt", "kept weights alone")
    parts = [kernel["dense"], kernel["pruned"], kernel["masked_machine"]]
    table.add_row("mean error per output", *(f"{p['mean_error']:.4f}" for p in parts))
    table.add_row("largest error", *(f"{p['max_error']:.4f}" for p in parts))
    if all(p["argmax_agreement"] is not None for p in parts):
        table.add_row("same answer as the model", *(f"{p['argmax_agreement']:.2%}" for p in parts))
    _print(table)
    layers = ", ".join(f"{n} {v['share']:.0%}" for n, v in kernel["pruned"]["by_layer"].items())
    steps = kernel["pruned"].get("steps")
    if steps and steps["finetuning"]:
        print(f"path of the pruned model: {steps['dense']} training steps, the pruning, {steps['finetuning']} fine-tuning steps")
        print(f"pruning changed the outputs through: {layers}")
    else:
        print(f"the outputs changed through: {layers}")


def sensitivity(result: dict[str, Any]) -> None:
    made, measure = result["made_from"], deciding(result.get("measures"))
    dense = f" (dense {measure.number(result['dense'][measure.name])})" if measure.name in result["dense"] else ""
    shares = [f"{s:g}" for s in made["sparsities"]]
    title = f"sensitivity, {made['structure']} by {made['criterion']}: validation {_in(measure)}{dense}"
    table = _table(f"{title}{_again(result['reused'])}", "layer, alone", *shares)
    rows: dict[str, list[str]] = {}
    for cell in result["cells"]:
        rows.setdefault(cell["layer"], []).append(measure.number(cell[measure.name]))
    for layer, values in rows.items():
        table.add_row(layer, *values)
    _print(table)
    print(f"sensitivity: {result['path']}")


def explain(result: dict[str, Any]) -> None:
    if result["what"] == "pruned":
        _explain_pruned(result)
    elif "masks" in result:
        _explain_two(result)
    elif result["what"] == "diff":
        _explain_diff(result)
    else:
        _explain_one(result)
    print(f"explain: {result['path']} ({result['cost']['seconds']:.1f} s)")


REFINED_AGAIN = "refined again after fine-tuning: here the last mask too is one of the dense weights, so not of the model itself"


def _explain_pruned(result: dict[str, Any]) -> None:
    before, after, refined = result["before"], result["after"], result["refine"]
    masks = [("before", before), ("after", after)] if before else [("blame", after)]
    went = " -> ".join(f"{mask['divergence']:.4g}" for _, mask in masks)
    print(f"explain: {result['title']}: divergence {went} ({_distance(result)}, {result['samples']} {result['split']} samples)")
    if refined:
        taken = [f"{e['stage']} {e['round']}: {e['accept']:.3g}" for e in refined["history"] if e["kept"]]
        few = taken if len(taken) <= 8 else [*taken[:4], "…", *taken[-3:]]
        print(f"  by round, on samples that accept: {', '.join(few)}")
    if result["refined_again"]:
        print(f"  {REFINED_AGAIN}")
    _blamed(masks)
    if before:
        moved = result["moved"]
        told = f"what came back was to blame for {before['part']['blame']:.4g} of {before['blame']:.4g}"
        print(f"  {moved['back']:,} came back, {moved['out']:,} went ({result['structure']}); {told}")
    elif refined:
        print("  the plan's file does not say which mask was refined; prune again to see both")
    _askers(result["units"], "came back" if before else "removed", "asked for by" if before else "missed by")
    residuals = " and ".join(f"{mask['residual']:.3g}" for _, mask in masks)
    print(f"  completeness: residual {residuals}, {result['nodes']} nodes")


def _explain_two(result: dict[str, Any]) -> None:
    first, second = result["masks"]
    print(
        f"explain: {result['title']}: divergence {first['divergence']:.4g} and {second['divergence']:.4g} ({_distance(result)}, "
        f"masks alone, {result['samples']} {result['split']} samples)"
    )
    _blamed([*((m["name"], m) for m in (first, second)), *((f"{m['name']} alone", m["part"]) for m in (first, second))])
    alone = ", ".join(f"{mask['name']} alone {mask['alone']:,}" for mask in (first, second))
    print(f"  both remove {result['both']:,} coordinates, {alone}")
    for mask in result["masks"]:
        _askers(mask["units"], f"removed by {mask['name']} alone", "missed by")
    print(f"  completeness: residual {first['residual']:.3g} and {second['residual']:.3g}, {result['nodes']} nodes")


def _distance(result: dict[str, Any]) -> str:
    """What a divergence is."""
    return f"{result.get('divergence_is', 'KL')} to the dense model"


def _blamed(masks: list[tuple[str, dict[str, Any]]]) -> None:
    """Blame by layer and by class, a column a mask under its head."""
    for kind, key in (("layers", "layer"), ("classes", "class")):
        table = _table("", f"blame by {key}", *(head for head, _ in masks))
        for rows in zip(*(mask.get(kind, ()) for _, mask in masks), strict=True):
            if any(row["blame"] for row in rows):
                table.add_row(str(rows[0][key]), *(f"{row['blame']:.4g}" for row in rows))
        if table.row_count:
            table.add_row("all", *(f"{mask['blame']:.4g}" for _, mask in masks))
            _print(table)


def _askers(units: list[dict[str, Any]], what: str, by: str) -> None:
    if not units:
        return
    table = _table("", what, "blame", f"{by} (label)")
    for unit in units:
        asked = ", ".join(f"{r['index']}{_told(r['label'])} {r['blame']:.2g}" for r in unit["samples"][:4])
        table.add_row(unit["name"], f"{unit['blame']:.4g}", asked)
    _print(table)


def _told(label: Any) -> str:
    """A label in brackets; not one of many places, which the page has room for."""
    return "" if isinstance(label, list) else f" ({text_of(label)})"


def _explain_one(result: dict[str, Any]) -> None:
    given, phases = result["contribution"], result["steps"]["phases"]
    print(f"explain: {result['title']}, {result['samples']} samples; contribution to {result['quantity']}")
    if "note" in result:
        print(f"  {result['note']}")
    valued = "target" in result
    if "rank" in given:
        told = f"  label {text_of(result['label'])}, answered {text_of(result['answer'])}"
        print(f"{told}; rank {given['rank']} of {given['of']} training samples")
    elif result["what"] == "sample":
        what = f"; {result['target']} {given['model']:.4g}" if valued else f": {given['model']:.4g}"
        told = f"  label {text_of(result['label'])}, answered {text_of(result['answer'])}{what}"
        print(f"{told} = {given['model_at_start']:.4g} at the start {given['kernel']:+.4g} by gradients "
              f"{given['regularisation']:+.4g} by weight decay and other")  # fmt: skip
    else:
        what = "in sum over a sample's, mean" if valued else "to the right answer, mean"
        print(f"  {what}: {given['both']:.4g} = {given['kernel']:.4g} by gradients "
              f"{given['regularisation']:+.4g} by weight decay and other; the model's own {given['model']:.4g}")  # fmt: skip
    if result["classes"]:
        several = ("start", "own", *(() if valued else ("others", "tells_apart")), "kernel", "regularisation", "model")
        columns = [key for key in several if key in result["classes"][0]]
        names = {**_COLUMNS, "own": "all samples"} if valued else _COLUMNS
        table = _table("", "output" if valued else "class", *(names.get(key, key) for key in columns))
        for row in result["classes"][:10]:
            table.add_row(str(row["class"]), *(f"{row[key]:.4g}" for key in columns))
        _print(table)
    told = ", ".join(f"{p['begin']}-{p['end'] - 1} {p['kernel'] + p.get('regularisation', 0.0):+.3g}" for p in phases)
    print(f"  when (steps): {told}; half of all movement by step {result['steps']['half_by']}")
    for row in result.get("layers", {}).get("rows", ()):
        print(f"  through {row['layer']}: {sum(p['kernel'] + p['regularisation'] for p in row['phases']):+.4g}")
    training = result.get("training")
    if training and "note" in training:
        print(f"  training samples: left out: {training['note']}")
    elif training:
        for side in ("raised", "lowered"):
            shown = ", ".join(f"{r['index']} (label {text_of(r['label'])}) {r['score']:+.3g}" for r in training[side][:6])
            print(f"  training samples that {side} it: {shown or 'none'}")
    for found in result["pruning"]:
        if "removed" in found:
            told = f"{'stays' if found['stays'] else 'removed'}, {found['removed']} of its {found['of']} weights gone"
            moved = f"{'it' if valued else 'the right answer'} moved {found['change']:+.4g} through them"
            print(f"  {found['name']}: {told}, {moved} (the whole pruning: {found['whole_change']:+.4g})")
        else:
            layers = ", ".join(f"{n} {v:+.3g}" for n, v in found["by_layer"].items())
            print(f"  {found['name']}: answers {text_of(found['answer'])}; the pruning moved it {found['change']:+.4g}: {layers}")
    sure = result["certificate"]
    own = f"; the part's own sums are off by {sure['part_error']:.2%}" if sure.get("part_error") else ""
    print(f"  certificate: rebuilt with {sure['nodes']} node(s) a step, mean error {sure['mean_error']:.4g} of outputs of size "
          f"{sure['mean_output']:.4g}{own}")  # fmt: skip


_COLUMNS = {
    "own": "its samples", "others": "others", "tells_apart": "difference", "regularisation": "decay", "kernel": "gradients",
}  # fmt: skip


def _explain_diff(result: dict[str, Any]) -> None:
    changed, valued = result["changed"], "task" in result
    if valued:
        moved = [
            f"{m.title} {m.text(result['figures'][m.name]['dense'])} to {m.text(result['figures'][m.name]['pruned'])}"
            for m in shown(result["measures"])
            if m.name in result["figures"]
        ]
        told = f"the outputs of {result['samples']} {result['split']} samples moved by {result['divergence']:.4g}"
        print(f"explain: {result['title']}: {told} ({_distance(result)}){''.join(f', {m}' for m in moved)}")
        print(f"  {result['note']}")
    else:
        accuracy = result["accuracy"]
        print(
            f"explain: {result['title']}: {changed['all']} of {result['samples']} {result['split']} samples changed their answer "
            f"({changed['right_to_wrong']} right to wrong, {changed['wrong_to_right']} wrong to right), accuracy "
            f"{accuracy['dense']:.2%} to {accuracy['pruned']:.2%}"
        )
    if not result["changes"]:
        return
    which = "samples that moved furthest" if valued else "changed samples"
    table = _table(f"most blamed, mean over {changed['shown']} {which}", "removed", "blame", "first for")
    for row in result["groups"][:12]:
        table.add_row(row["name"], f"{row['blame']:+.4g}", str(row["first_for"]))
    _print(table)
    margins = ("distance",) if valued else ("margin", "after")
    table = _table("samples", "", "label", "dense", "pruned", *margins, "most blamed")
    for row in result["changes"][:12]:
        blamed = ", ".join(f"{g['name']} {g['blame']:+.2g}" for g in row["groups"][:3])
        numbers = (row["index"], row["label"], row["dense"], row["pruned"])
        values = (-row["margin_pruned"],) if valued else (row["margin_dense"], row["margin_pruned"])
        table.add_row(*map(text_of, numbers), *(f"{value:.3g}" for value in values), blamed)
    _print(table)
    sure = result["certificate"]
    layers = ", ".join(f"{row['layer']} {row['blame']:+.3g}" for row in result["layers"] if row["blame"])
    print(f"  by layer: {layers}")
    print(f"  completeness: residual {sure['mean_residual']:.3g} of a change of {sure['mean_change']:.3g}, {sure['nodes']} nodes")


def report(result: tuple[Path, list[str]]) -> None:
    path, left_out = result
    for line in left_out:
        print(f"report: left out: {line}")
    print(f"report: {path}")


def info(result: dict[str, Any]) -> None:
    _tree(result, "")


def _tree(value: dict[str, Any], indent: str) -> None:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{key}:")
            _tree(inner, indent + "  ")
        else:
            print(f"{indent}{key}: {inner}")


SHOW: dict[str, Callable[[Any], None]] = {
    "train": train,
    "import": imported,
    "score": score,
    "compare": compare,
    "study": study,
    "prune": prune,
    "eval": evaluate,
    "sensitivity": sensitivity,
    "explain": explain,
    "report": report,
    "info": info,
}
