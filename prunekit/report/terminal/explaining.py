"""What explain prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from prunekit.explain.answers import text_of
from prunekit.report.measures import shown
from prunekit.report.terminal.tables import new_table, print_table

WEIGHTS_TOO = (
    "its weights were learnt with the mask: rounds tell what both come to, the rest what the mask alone does to the dense weights"
)
BY_LAYERS = "its weights were found with the mask, layer by layer: here is what the mask alone does to the dense weights"
REFINED_AGAIN = "refined again after fine-tuning: here the last mask too is one of the dense weights, so not of the model itself"
FEW_TEXTS = 3  # texts that are printed; the page has more
LINE = 100  # characters of a text in one line
FEW = 8  # units of a sample that are printed; its page has more
_COLUMNS = {"own": "its samples", "tells_apart": "difference"}


def show_explanation(result: dict[str, Any]) -> None:
    if result["what"] == "pruned":
        _explain_pruned(result)
    elif result["what"] == "errors":
        _explain_errors(result)
    elif result["what"] == "ranking":
        _explain_ranking(result)
    elif "masks" in result:
        _explain_two(result)
    elif result["what"] == "diff":
        _explain_diff(result)
    else:
        _explain_one(result)
    print(f"explain: {result['path']} ({result['cost']['seconds']:.1f} s)")


def _explain_errors(result: dict[str, Any]) -> None:
    by, rows, of = result["by"], result["rows"], f"{result['samples']:,} {result['split']} samples"
    if by == "margin":
        share = f" ({result['errors'] / result['samples']:.2%})" if result["samples"] else ""
        print(
            f"explain: {result['title']}: {result['errors']:,} of {of}{share}; margin: the answer's output less the right one's"
        )
    else:
        print(f"explain: {result['title']}: mean {result['mean']:.4g} of {of}, {result['errors']:,} lose more")
    columns = ("margin",) if by == "margin" else ("loss", "above")
    heads = {"above": "above the mean"}
    table = new_table("", "sample", "class" if by == "margin" else "label", "answered", *(heads.get(c, c) for c in columns))
    for row in rows:
        table.add_row(*(text_of(row[key]) for key in ("index", "label", "answer")), *(f"{row[key]:.4g}" for key in columns))
    if rows:
        print_table(table)
        split = "" if result["split"] == "test" else f" --split {result['split']}"
        run = shlex.quote(str(Path(result["path"]).parent.parent))
        print(f"  why the first: prunekit explain {run} sample {rows[0]['index']}{split}")


def _explain_ranking(result: dict[str, Any]) -> None:
    print(f"explain: {result['title']} ({_looked_at(result)}); contribution to {result['quantity']}")
    _ranked(result["ranks"], result, result["within"])
    _complete(result)


def _looked_at(result: dict[str, Any]) -> str:
    """How many samples, and which."""
    count = f"{result['samples']:,} {result['split']} sample{'' if result['samples'] == 1 else 's'}"
    chosen = result.get("chosen")
    if chosen is None:
        return count
    if chosen["samples"] == "errors":
        return f"{count}, the most wrong of {chosen['of']:,} errors"
    return f"{count}: {chosen['samples']}"


def _ranked(kind: str, ranking: dict[str, Any], within: dict[str, Any] | None = None) -> None:
    """Parts of a kind by what they gave, strongest first."""
    if "note" in ranking and not ranking["rows"]:
        print(f"  {ranking['note']}")
        return
    rows = ranking["rows"]
    columns = ("both", "kernel", "regularisation", *(("inside",) if rows and "inside" in rows[0] else ()))
    heads = {"both": "gave", "inside": "in its layer", **_COLUMNS}
    table = new_table("", kind, *(heads.get(key, key) for key in columns))
    for row in rows:
        table.add_row(row["name"], *(f"{row[key]:+.4g}" for key in columns))
    if rows:
        print_table(table)
    if ranking["parts"] > len(rows):
        print(f"  the {len(rows)} strongest of {ranking['parts']:,} {kind}s")
    if within is not None:
        print(
            f"  layer {within['layer']} gave {within['whole']:+.4g}, of which {within['left']:+.4g} lies in none of its {kind}s"
        )


def _complete(result: dict[str, Any]) -> None:
    sums = result["completeness"]
    print(f"  completeness: {sums['start']:.4g} at the start {sums['layers']:+.4g} through all layers {sums['residual']:+.2g} "
          f"(residual) = {sums['model']:.4g}")  # fmt: skip


def _explain_pruned(result: dict[str, Any]) -> None:
    before, after, refined = result["before"], result["after"], result["refine"]
    masks = [("before", before), ("after", after)] if before else [("blame", after)]
    went = " -> ".join(f"{mask['divergence']:.4g}" for _, mask in masks)
    print(f"explain: {result['title']}: divergence {went} ({_distance(result)}, {result['samples']} {result['split']} samples)")
    if refined:
        taken = [f"{e['stage']} {e['round']}: {e['accept']:.3g}" for e in refined["history"] if e["kept"]]
        few = taken if len(taken) <= 8 else [*taken[:4], "…", *taken[-3:]]
        print(f"  by round, on samples that accept: {', '.join(few)}")
        if "weights" in refined.get("stream", {}):
            print(f"  {WEIGHTS_TOO}")
    if result.get("by_layers"):
        print(f"  {BY_LAYERS}")
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
        table = new_table("", f"blame by {key}", *(head for head, _ in masks))
        for rows in zip(*(mask.get(kind, ()) for _, mask in masks), strict=True):
            if any(row["blame"] for row in rows):
                table.add_row(str(rows[0][key]), *(f"{row['blame']:.4g}" for row in rows))
        if table.row_count:
            table.add_row("all", *(f"{mask['blame']:.4g}" for _, mask in masks))
            print_table(table)


def _askers(units: list[dict[str, Any]], what: str, by: str) -> None:
    if not units:
        return
    table = new_table("", what, "blame", f"{by} (label)")
    for unit in units:
        asked = ", ".join(f"{r['index']}{_told(r['label'])} {r['blame']:.2g}" for r in unit["samples"][:4])
        table.add_row(unit["name"], f"{unit['blame']:.4g}", asked)
    print_table(table)


def _told(label: Any) -> str:
    """A label in brackets; not one of many places, which the page has room for."""
    return "" if isinstance(label, list) else f" ({text_of(label)})"


def _explain_one(result: dict[str, Any]) -> None:
    given, phases = result["contribution"], result["steps"]["phases"]
    samples = f"{result['samples']} samples" if "chosen" not in result else _looked_at(result)
    print(f"explain: {result['title']}, {samples}; contribution to {result['quantity']}")
    if "note" in result:
        print(f"  {result['note']}")
    valued, asked = "target" in result, "asked" in result
    if "rank" in given:
        told = f"  label {text_of(result['label'])}, answered {text_of(result['answer'])}"
        print(f"{told}; rank {given['rank']} of {given['of']} training samples")
    elif result["what"] == "sample":
        what = f"; {result['asked']} {given['model']:.4g}"
        told = f"  label {text_of(result['label'])}, answered {text_of(result['answer'])}{what}"
        print(f"{told} = {given['model_at_start']:.4g} at the start {given['kernel']:+.4g} kernel "
              f"{given['regularisation']:+.4g} regularisation")  # fmt: skip
    else:
        what = "in sum" if asked else "in sum over a sample's, mean" if valued else "to the right answer, mean"
        print(f"  {what}: {given['both']:.4g} = {given['kernel']:.4g} kernel "
              f"{given['regularisation']:+.4g} regularisation; the model's own {given['model']:.4g}")  # fmt: skip
    if result["classes"]:
        several = ("start", "own", *(() if valued else ("others", "tells_apart")), "kernel", "regularisation", "model")
        columns = [key for key in several if key in result["classes"][0]]
        names = {**_COLUMNS, "own": "all samples"} if valued else _COLUMNS
        table = new_table("", "output" if valued else "class", *(names.get(key, key) for key in columns))
        for row in result["classes"][:10]:
            table.add_row(str(row["class"]), *(f"{row[key]:.4g}" for key in columns))
        print_table(table)
    told = ", ".join(f"{p['begin']}-{p['end'] - 1} {p['kernel'] + p.get('regularisation', 0.0):+.3g}" for p in phases)
    print(f"  when (steps): {told}; half of all movement by step {result['steps']['half_by']}")
    _tokens(result)
    for kind, ranking in result.get("ranked", result.get("inside", {})).items():
        few = {**ranking, "rows": ranking["rows"][: None if kind == "layer" or "inside" in result else FEW]}
        _ranked(kind, few, ranking.get("within"))
    if "completeness" in result:
        _complete(result)
    training = result.get("training")
    if training and "note" in training:
        print(f"  training samples: left out: {training['note']}")
    elif training:
        for side in ("raised", "lowered"):
            shown = ", ".join(
                f"{r['index']}{_label(r)} {r['score']:+.3g}, mostly in steps {r['mostly']['begin']}-{r['mostly']['end'] - 1}"
                for r in training[side][:6]
            )
            print(f"  training samples that {side} it: {shown or 'none'}")
            for r in training[side][:FEW_TEXTS]:
                if "text" in r:
                    print(f"    {r['index']}: {_line(r['text'])}")
    for found in result["pruning"]:
        if "removed" in found:
            told = f"{'stays' if found['stays'] else 'removed'}, {found['removed']} of its {found['of']} weights gone"
            moved = f"{'it' if valued or asked else 'the right answer'} moved {found['change']:+.4g} through them"
            print(f"  {found['name']}: {told}, {moved} (the whole pruning: {found['whole_change']:+.4g})")
        else:
            layers = ", ".join(f"{n} {v:+.3g}" for n, v in found["by_layer"].items())
            print(f"  {found['name']}: answers {text_of(found['answer'])}; the pruning moved it {found['change']:+.4g}: {layers}")
    sure = result["certificate"]
    own = f"; the part's own sums are off by {sure['part_error']:.2%}" if sure.get("part_error") else ""
    print(f"  certificate: rebuilt with {sure['nodes']} node(s) a step, mean error {sure['mean_error']:.4g} of outputs of size "
          f"{sure['mean_output']:.4g}{own}")  # fmt: skip


def _label(row: dict[str, Any]) -> str:
    """A training sample's label in brackets; none of text, which is shown itself."""
    return "" if "text" in row else f" (label {text_of(row['label'])})"


def _tokens(result: dict[str, Any]) -> None:
    """The text of samples with the tokens that were moved most between marks, and those by what moved them."""
    account = result.get("tokens")
    if account is None or not any("index" in sample for sample in account["samples"]):
        return
    what = "log-probability" if account["of"] == "log_prob" else account["of"]
    for sample in account["samples"][:FEW_TEXTS]:
        asked = [(n, row) for n, row in enumerate(sample["rows"]) if row["gave"] is not None]
        strongest = sorted(asked, key=lambda one: -abs(one[1]["gave"]))[:FEW]
        marked = {n for n, _ in strongest}
        text = "".join(f"⟦{row['text']}⟧" if n in marked else row["text"] for n, row in enumerate(sample["rows"]))
        print(f"  text of sample {sample['index']}, the tokens that were given most {what} in ⟦ ⟧:")
        print("".join(f"    | {line}\n" for line in text.split("\n")), end="")
        names = list(asked[0][1]["pruned"]) if asked else []
        table = new_table("", "token", "position", "gave", "model", *names)
        for n, row in strongest:
            numbers = (row["gave"], row["model"], *(row["pruned"][name] for name in names))
            table.add_row(_line(row["text"]), str(n), *(f"{value:+.3g}" for value in numbers))
        if strongest:
            print_table(table)


def _line(text: str) -> str:
    """A text in one line that is not too long; quotes show where it begins and ends."""
    short = text if len(text) <= LINE else f"{text[:LINE]}…"
    return json.dumps(short, ensure_ascii=False)


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
    table = new_table(f"most blamed, mean over {changed['shown']} {which}", "removed", "blame", "first for")
    for row in result["groups"][:12]:
        table.add_row(row["name"], f"{row['blame']:+.4g}", str(row["first_for"]))
    print_table(table)
    margins = ("distance",) if valued else ("margin", "after")
    table = new_table("samples", "", "label", "dense", "pruned", *margins, "most blamed")
    for row in result["changes"][:12]:
        blamed = ", ".join(f"{g['name']} {g['blame']:+.2g}" for g in row["groups"][:3])
        numbers = (row["index"], row["label"], row["dense"], row["pruned"])
        values = (-row["margin_pruned"],) if valued else (row["margin_dense"], row["margin_pruned"])
        table.add_row(*map(text_of, numbers), *(f"{value:.3g}" for value in values), blamed)
    print_table(table)
    sure = result["certificate"]
    layers = ", ".join(f"{row['layer']} {row['blame']:+.3g}" for row in result["layers"] if row["blame"])
    print(f"  by layer: {layers}")
    print(f"  completeness: residual {sure['mean_residual']:.3g} of a change of {sure['mean_change']:.3g}, {sure['nodes']} nodes")
