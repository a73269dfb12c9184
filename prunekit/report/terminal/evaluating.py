"""What eval prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunekit.explain import EvaluationRecord
from prunekit.explain.account import Fit
from prunekit.measure import noisy
from prunekit.report.measures import shown, three
from prunekit.report.terminal.language import difference, show_language
from prunekit.report.terminal.tables import again, new_table, print_table
from prunekit.report.verdict import of_evaluation

SIZES = {
    "parameters": "parameters",
    "nonzero": "non-zero parameters",
    "macs": "theoretical MACs",
    "bytes": "bytes on disk",
    "zipped": "the same zipped",
}
NOISY = "the machine was too busy for these times to be known to 3 %: a speed-up differs from the one shown within its interval"
NO_ACCOUNT = (
    "it follows a path on one device, which a run of one checkpoint has where a pruned model was trained on, and weights that "
    "become 0, which say nothing of experts and of blocks that normalise their output"
)


def show_verdicts(found: Sequence[tuple[str, EvaluationRecord]]) -> None:
    """One line for each pruned model, by its name."""
    for name, record in found:
        print(f"{name}: {of_evaluation(record).text()}")


def show_evaluation(result: tuple[str, EvaluationRecord, bool]) -> None:
    _tables(result)
    print(of_evaluation(result[1]).text())


def _tables(result: tuple[str, EvaluationRecord, bool]) -> None:
    name, e, reused = result
    others = {"before squeezing": e.masked} if e.masked is not None else {}
    small = {**others, "pruned": e.pruned}
    models = {"dense": e.dense, **small}
    between = [""] * len(others)
    differences = e.language["paired"]["differences"] if e.language else None
    beside = [] if differences is None else ["pruned − dense"]
    table = new_table(f"eval: {name}, {e.test_samples} test samples{again(reused)}", "", *models, *beside)
    measures = shown(e.measures)
    for measure in measures:
        told = [None, *small.values()] if measure.close else models.values()
        apart = [] if differences is None else [difference(differences[measure.name], measure.unit)]
        table.add_row(measure.label, *(measure.text(found[measure.name]) if found else "" for found in told), *apart)
    table.add_row("sparsity, prunable / all", "", *between, f"{e.sparsity['prunable']:.4f} / {e.sparsity['all']:.4f}")
    if asked := e.asked_classes:
        first = measures[0]
        listed = ", ".join(map(str, asked["classes"]))
        for figures, what in ((asked.get("on_classes"), f"classes {listed}"), (asked.get("on_others"), "the others")):
            if figures is not None:
                told_of = first.text(figures["dense"]), *between, first.text(figures[first.name])
                table.add_row(f"{first.title} on {what}", *told_of)
    for key, label in SIZES.items():
        if key in e.pruned:
            table.add_row(label, *(f"{found[key]:,}" if key in found else "" for found in models.values()))
    for size, times in e.latency["batches"].items():
        measured = ("dense_ms", *(["masked_ms"] if others else []), "pruned_ms")
        table.add_row(f"latency, batch {size} (ms)", *(three(times[key]) for key in measured))
        if "speedup" in times:
            speedup, low, high = (three(times[key]) for key in ("speedup", "low", "high"))
            table.add_row(f"speed-up, batch {size}", "", *[""] * len(others), f"{speedup}× ({low}–{high})")
    print_table(table)
    print(f"latency on {e.latency['machine']}" + (f"; {e.latency['conditions']}" if "conditions" in e.latency else ""))
    if any("speedup" in times and noisy(times) for times in e.latency["batches"].values()):
        print(NOISY)
    if refined := e.refine:
        before, after = refined["before"]["accept"], refined["after"]["accept"]
        later = [f"{a['before']['accept']:.4g} -> {a['after']['accept']:.4g}" for a in refined.get("again", ())]
        print(f"refined: divergence {'; after fine-tuning '.join([f'{before:.4g} -> {after:.4g}', *later])}")
    if e.language is not None:
        show_language(e.language)
    _onnx(e)
    _harness(e)
    kernel = e.kernel
    if kernel is None:
        asked = e.made_from["options"].get("samples")
        why = "eval.samples is 0" if asked == 0 else NO_ACCOUNT
        print(f"kernel: no account; {why}")
        return
    table = new_table(f"kernel, {kernel['samples']} test samples", "", "dense rebuilt", "pruned rebuilt", "kept weights alone")
    parts: list[Fit] = [kernel["dense"], kernel["pruned"], kernel["masked_machine"]]
    table.add_row("mean error per output", *(f"{p['mean_error']:.4f}" for p in parts))
    table.add_row("largest error", *(f"{p['max_error']:.4f}" for p in parts))
    if all(p["argmax_agreement"] is not None for p in parts):
        table.add_row("same answer as the model", *(f"{p['argmax_agreement']:.2%}" for p in parts))
    print_table(table)
    layers = ", ".join(f"{n} {v['share']:.0%}" for n, v in kernel["pruned"]["by_layer"].items())
    steps, anew = kernel["pruned"].get("steps"), kernel["pruned"].get("new_values", 0)
    if steps and (steps["finetuning"] or anew):
        begun = f"{steps['dense']} training steps" if steps["dense"] else "the imported model"
        pruning = "the pruning" + (f", which set {anew:,} of the kept weights anew" if anew else "")
        tuned = f", {steps['finetuning']} fine-tuning steps" if steps["finetuning"] else ""
        print(f"path of the pruned model: {begun}, {pruning}{tuned}")
        print(f"pruning changed the outputs through: {layers}")
    else:
        print(f"the outputs changed through: {layers}")


def _onnx(e: EvaluationRecord) -> None:
    """A line a batch of an ONNX export beside torch."""
    for size, times in (e.onnx["batches"] if e.onnx else {}).items():
        faster = f"{three(times['speedup'])}× as fast ({three(times['low'])}–{three(times['high'])})"
        ours, theirs = three(times["onnx_ms"]), three(times["torch_ms"])
        print(f"batch of {size} on the processor: {ours} ms in onnxruntime, {theirs} ms in torch, {faster}")


def _harness(e: EvaluationRecord) -> None:
    """A table of what the lm-evaluation-harness measured."""
    if e.lm_eval is None:
        return
    table = new_table(e.lm_eval["harness"], "task", "figure", "dense", "pruned")
    for name, told in e.lm_eval["tasks"].items():
        for figure in (figure for figure in told["pruned"] if "_stderr" not in figure):
            error = figure.replace(",", "_stderr,") if "," in figure else f"{figure}_stderr"
            table.add_row(name, figure, *(_with_error(told[model], figure, error) for model in ("dense", "pruned")))
    print_table(table)


def _with_error(figures: Mapping[str, float], figure: str, error: str) -> str:
    return f"{figures[figure]:.4g}" + (f" ± {figures[error]:.2g}" if error in figures else "")
