"""What prune prints."""

from __future__ import annotations

from typing import Any

from prunekit.measure import noisy
from prunekit.plan import GROUPED
from prunekit.report.measures import by_name, deciding, three
from prunekit.report.terminal.tables import again, new_table, print_table
from prunekit.report.verdict import of_pruned
from prunekit.training.line_search import LONGEST, SHORTEST

_ENDS = {"done": "", "patience": "", "budget": ", until the budget was spent", "interrupted": ", interrupted: the best so far"}


def show_pruned(result: dict[str, Any]) -> None:
    what = "plan" if result.get("dry_run") else "prune"
    notes = (" (plan edited by hand)" if result["edited"] else "") + (", compensated" if result["compensated"] else "")
    print(
        f"{what}: {result['name']}: {result['structure']} by {result['criterion']} ({result['allocation']}), "
        f"{'found' if result['budget'] else 'asked'} {result['asked']:.4f}, removed {result['achieved']:.4f} of prunable and "
        f"{result['achieved_all']:.4f} of all parameters{notes} -> {result['path']}{again(result['reused'])}"
    )
    if later := result.get("later"):
        print(f"  nothing was trained, and a plan says no training: give {', '.join(later)} to --apply too")
    if result["layerwise"]:
        print(f"  {_by_layers(result)}")
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
        if "stream" in refined:
            print(f"  {_streamed(refined['stream'])}")
        if "note" in refined:
            print(f"  {refined['note']}")
    if division := result["division"]:
        print(f"  {_division(division, result['measures'])}")
    for number, refined in enumerate(result["refined_again"], 1):
        print(f"  {_refined_again(number, refined)}")
    if tried := result["refine_tried"]:
        print(f"  {_tried(tried, result['measures'])}")
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
            measure = by_name(name, result["measures"])
            told += f", validation {measure.title} {measure.text(found[f'{name}_pruned'])}"
            told += (
                f", after {found['steps']} step{'s' * (found['steps'] != 1)}{_rate(found)} {measure.text(found[name])}"
                if found["steps"]
                else ""
            )
        print(f"{told} ({found['seconds']:.1f} s)")
    if lora := (result.get("finetune") or {}).get("lora"):
        print(f"  {_low_rank(lora)}")
    if result.get("recalibrated") == 0:
        print("  recalibrate: the model has no BatchNorm layer, so there was nothing to measure anew")
    table = new_table("", "parameter", "weights", "kept", "kept %")
    for name, count in result["layers"].items():
        table.add_row(name, f"{count['total']:,}", f"{count['kept']:,}", f"{100 * count['kept'] / count['total']:.1f}")
    print_table(table)
    emptied = [name for name, count in result["layers"].items() if count["total"] and not count["kept"]]
    if emptied and result["structure"] != "layers":  # a block that leaves is passed by
        floor = "" if result["layerwise"] else " (--floor keeps a share of each)"
        print(f"  nothing is left of {', '.join(emptied)}: what follows gets nothing from there{floor}")
    if result["groups"]:
        table = new_table("", "blocks" if result["structure"] == "layers" else "units of", "before", "kept")
        for name, count in sorted(result["groups"].items()):
            table.add_row(name, str(count["total"]), str(count["kept"]))
        print_table(table)
    for name, reason in result["refused"].items():
        print(f"  left whole: {name}: {reason}")
    print(of_pruned(result, deciding(result["measures"])).text())


def _rate(found: dict[str, Any]) -> str:
    """The rate that a round of training chose itself."""
    return f" {from_rate(found['rate'])}" if "rate" in found else ""


def from_rate(rate: float) -> str:
    """A rate that was searched for; one at an end of what is tried says more than its number."""
    told = f"from rate {rate:.1e}"
    if rate < 1.01 * SHORTEST:
        return f"{told} (no step lowers what is judged by)"
    return f"{told} (the largest that is tried)" if rate > 0.99 * LONGEST else told


def _low_rank(lora: dict[str, Any]) -> str:
    """One line on what was trained in the place of the model."""
    told = f"lora of rank {lora['rank']}: {lora['trained']:,} values were trained, which move {lora['of']:,} weights"
    held = [f"{name} ({why})" for name, why in lora["held"].items()]
    return told + (f"; as they were: {', '.join(held[:5])}{' …' if len(held) > 5 else ''}" if held else "")


def _by_layers(result: dict[str, Any]) -> str:
    """One line on what a layer-wise method looked at, and which weights the model has."""
    facts = result["layerwise"]
    weights = "kept weights have new values" if facts["changes"] else "kept weights are the dense model's"
    if result["refine"]:
        both = "weights" in result["refine"].get("stream", {})
        weights = "mask and weights were learnt on from there" if both else "its mask was refined, with the dense model's weights"
    shares = f", how much of each goes by {facts['shares']['criterion']}" if "shares" in facts else ""
    told = f"layer by layer from {facts['samples']:,} training samples, compared within {facts['within']}{shares}; {weights}"
    if facts.get("by_magnitude"):
        told += f"; no sample reaches {', '.join(facts['by_magnitude'])}, pruned by magnitude"
    return told


_SPENT = {
    "mask": "the mask alone", "together": "mask and weights together", "mask, then weights": "the mask, then the weights",
    "weights": "the weights alone", "layers, then weights": "the weights, after ADMM's mask and weights layer by layer",
    "layers, then together": "mask and weights together, from ADMM's layer by layer",
    "refit, then weights": "the weights, refitted first",
    "mask, refit, then weights": "the mask, then the weights, refitted between",
}  # fmt: skip


def spent_on(division: dict[str, Any]) -> str:
    """What tokens were divided between, in words."""
    return _SPENT[division["way"]]


def _division(division: dict[str, Any], measures: list[Any]) -> str:
    """One line on how tokens were divided."""
    first = next(iter(division["tries"].values()))
    measure = by_name(next(iter(first)), measures)
    tries = ", ".join(f"{way} {measure.text(found[measure.name])}" for way, found in division["tries"].items())
    told = f"tokens spent on {spent_on(division)}; tries, validation {measure.title}: {tries}"
    told += "".join(f"; {way} not tried, {why}" for way, why in division.get("left_out", {}).items())
    if beside := division.get("layerwise"):
        told += f"\n  {_beside_layers(beside, measures)}"
    return told


def _beside_layers(beside: dict[str, Any], measures: list[Any]) -> str:
    """One line on a layer-wise method, which was tried since the same samples were looked at again."""
    method = {"admm": "ADMM"}.get(beside["method"], beside["method"])
    told = f"the training samples have fewer tokens, so {method}, layer by layer, was tried too: "
    if "why" in beside:
        return f"{told}not compared, {beside['why']}"
    measure = by_name(next(iter(beside["figures"])), measures)
    of_layers, learnt = (measure.text(beside[key][measure.name]) for key in ("figures", "learnt"))
    kept = "its" if beside["better"] else "the learnt"
    return f"{told}validation {measure.title} {of_layers}, learnt {learnt}; {kept} model is kept"


def _streamed(facts: dict[str, Any]) -> str:
    """One line on what a stream cost."""
    told = f"learnt from {facts['tokens']:,} training tokens in {facts['steps']:,} steps"
    if "seconds" in facts:
        parts = facts["bytes"]
        told += f", {facts['seconds']:.2g} s each; beside the model and a batch, {sum(parts.values()):.1f} bytes a weight"
        of_weights = f", values and moments of weights {parts['weights']:.1f}" if "weights" in parts else ""
        told += f" (its copy {parts['copy']:g}, scores {parts['scores']:.1f}{of_weights})"
    return told


def _kept_of(structure: str) -> str:
    """What a plan of ``structure`` counts as kept."""
    if structure not in GROUPED:
        return "weights"
    return structure if "+" not in structure else "units"


def _budget(result: dict[str, Any]) -> str:
    """One line on a budget, and how far the plan goes towards it."""
    ((name, asked),) = result["budget"].items()
    option = f"--{name.replace('_', '-')} {asked:,g}"
    if (speed := result.get("speed")) is not None:
        unit = "×" if name == "speedup" else " ms"
        noise = "; the machine was too noisy for less" if noisy(speed) else ""
        return (
            f"{option}: reached {three(result['reached'])}{unit}, {three(speed['speedup'])}× (95 %: {three(speed['low'])}–"
            f"{three(speed['high'])}{noise}) the dense model's speed at batch {speed['batch']}, {speed['rounds']} rounds"
        )
    if "standard_error" not in result:
        return f"{option}: the plan comes to {result['reached']:,.6g}"
    measure = by_name(result.get("measure", "accuracy"), result["measures"])
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


def _tried(tried: dict[str, Any], told: list[dict[str, Any]]) -> str:
    """One line on a refinement that was to be taken only if it is better."""
    if "why" in tried:
        return f"refine not tried: {tried['why']}"
    before, after = tried["unrefined"], tried["refined"]
    measures = [by_name(name, told) for name in before]
    figures = ", ".join(f"{m.brief} {m.text(before[m.name])} -> {m.text(after[m.name])}" for m in measures)
    if tried["kept"]:
        return f"refine tried: taken, better on validation data ({figures})"
    return f"refine tried: not taken, no better on validation data ({figures}){_ENDS[tried['ended']]}"
