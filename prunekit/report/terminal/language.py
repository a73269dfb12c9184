"""What eval and latency print of a language model: how it was measured, what was lost on the same windows, tokens a second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prunekit.explain.evaluation import Generated, LanguageFigures
from prunekit.measure.generation import Pace, how
from prunekit.measure.latency import Interval
from prunekit.report.measures import three
from prunekit.report.terminal.tables import new_table, print_table
from prunekit.task.protocol import Difference, Paired, Protocol

PEAKS = {"prefill_peak": "peak of a prefill", "decode_peak": "peak of decoding"}


def show_language(found: LanguageFigures) -> None:
    for line in protocol_told(found["protocol"]):
        print(line)
    print(paired_told(found["paired"]))
    if "generation" in found:
        show_generation(found["generation"])


def protocol_told(p: Protocol) -> Iterable[str]:
    """The protocol in two lines."""
    apart = f", beginning {p['stride']:,} tokens apart" if "stride" in p else ""
    windows = f"{p['windows']:,} windows of {p['split']} data, {p['length']:,} tokens each at most{apart}"
    yield f"protocol: {windows}; asked for: {p['asked']}"
    of_text = f", {p['bytes']:,} bytes of text" if "bytes" in p else ""
    yield (
        f"perplexity is exp(mean −log p) over {p['tokens']:,} tokens{of_text}, not over windows; {p['ignored']:,} places are "
        f"ignored (label {p['ignore_index']}, padding)"
    )


def paired_told(p: Paired) -> str:
    """What was lost, in one line."""
    ratio, nats = p["perplexity_ratio"], p["differences"]["nats_per_token"]
    between = f" (95 % interval {ratio['low']:.4f}–{ratio['high']:.4f})" if "low" in ratio else ""
    told = f"perplexity × {ratio['ratio']:.4f}{between}: {difference(nats, 'nats')} nats a token"
    return f"{told}; errors are standard errors of the paired difference over {p['windows']:,} windows"


def difference(found: Difference, unit: str) -> str:
    """``+0.43 ± 0.02``, in points of a share; of a measure of closeness the error alone."""
    digits = 2 if unit == "%" else 4
    error = f"± {found['standard_error']:.{digits}f}" if "standard_error" in found else ""
    if "difference" not in found:
        return error
    points = " points" if unit == "%" else ""
    return f"{found['difference']:+.{digits}f}{points} {error}".replace("-", "−").strip()


def show_generation(found: Generated) -> None:
    """Tokens a second and memory; what is not known is said."""
    asked = "" if found["asked"] == [found["prompt"], found["tokens"]] else f", as the model has few positions ({_asked(found)})"
    names = list(found["memory"])
    heads = [f"{name} (tokens/s)" for name in names] + (["speed-up"] if "pruned" in names else [])
    table = new_table(f"generation: prompts of {found['prompt']:,} tokens, {found['tokens']:,} more{asked}", "", *heads)
    for size, pace in found["batches"].items():
        for label, rates in zip(("prefill", "decoding"), _paces(pace), strict=False):
            table.add_row(f"{label}, batch {size}", *_rates(rates))
    if found["batches"]:
        print_table(table)
        print(how())
        last = [
            rates["speedup" if "pruned" in names else names[0]] for pace in found["batches"].values() for rates in _paces(pace)
        ]
        if any(Interval(**each).noisy for each in last):
            print(
                "the machine was too busy for these to be known to 3 %: a figure differs from the one shown within its interval"
            )
    memory = found["memory"]
    told = [("weights", *(f"{memory[name]['weights']:,}" for name in names))]
    for key, label in (("cache", "cache"), *PEAKS.items()):
        sizes = memory[names[0]].get(key, {})
        for size in sizes if isinstance(sizes, dict) else ():
            told.append((f"{label}, batch {size}", *(f"{memory[name].get(key, {}).get(size, 0):,}" for name in names)))  # type: ignore[attr-defined]
    print("bytes of memory: " + "; ".join(f"{label} {' → '.join(figures)}" for label, *figures in told))
    if not any(key in memory[name] for key in PEAKS for name in names):
        print("peaks of memory are measured on CUDA alone")
    if "why" in found:
        print(f"generation: {found['why']}")


def _paces(pace: Pace) -> list[dict[str, dict[str, float]]]:
    """Of prefill, and of decoding where it was measured."""
    return [pace["prefill"], *([pace["decode"]] if "decode" in pace else [])]


def _asked(found: Generated) -> str:
    return "asked {:,} and {:,}".format(*found["asked"])


def _rates(rates: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for name, each in rates.items():
        times = "×" if name == "speedup" else ""
        yield f"{three(each['median'])}{times} ({three(each['low'])}–{three(each['high'])})"
