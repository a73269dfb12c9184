"""What compress prints, done or only foreseen."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from prunekit.report.measures import shown
from prunekit.report.terminal.pruning import from_rate, spent_on
from prunekit.report.terminal.tables import again

NAMED = 3
"""Parameters that stay whole and are named; ``--json`` has all."""


def show_compressed(result: dict[str, Any]) -> None:
    (pruned,), exported = result["prune"], result["export"]
    samples = ", ".join(f"{count:,} {name}" for name, count in result["samples"].items())
    total, task = pruned["parameters"]["total"], result["import"]["task"]
    print(f"compress: {result['model']}, {total:,} parameters, {task}; samples: {samples}")
    tried = ", ".join(each["criterion"] for each in result["score"])
    refined = (", refined" if pruned["refine"] else "") + (", compensated" if pruned["compensated"] else "")
    how = f"chosen on validation data: {pruned['criterion']}, {pruned['allocation']}{refined} (of {tried})"
    if pruned["layerwise"]:
        how = f"layer by layer: {pruned['criterion']}, from {pruned['layerwise']['samples']:,} training samples{refined}"
    if told := learnt(pruned):
        how += f"; {told}"
    print(f"{how}; {pruned['structure']}, {100 * pruned['achieved']:.1f} % of the prunable parameters removed")
    if pruned["missed"]:
        print(f"  {pruned['missed']}")
    _refused(pruned["refused"])
    for note in exported["notes"]:
        print(f"  note: {note}")
    print(f"  {result['report']} shows it; go on with prunekit prune {shlex.quote(str(Path(pruned['path']).parent.parent))} …")
    print(result["verdict"])
    folder = exported["folder"]
    what = "the smaller model" if pruned["achieved"] else "the model whole, since nothing had to go,"
    print(f"{folder} holds {what}{again(exported['reused'])}: {exported['loads_with']}({folder!r})")


def learnt(pruned: dict[str, Any]) -> str:
    """What tokens or epochs were spent on; nothing where none were."""
    if division := pruned["division"]:
        better = division.get("layerwise", {}).get("better")
        return f"tokens spent on {spent_on(division)}" + (
            ", which did no better than ADMM alone and is not kept" if better else ""
        )
    told = []
    if stream := (pruned["refine"] or {}).get("stream"):
        told.append(f"a mask learnt from {stream['tokens']:,} tokens")
    if tuned := pruned["finetune"]:
        told.append(_trained(tuned))
    return ", then ".join(told)


def _trained(tuned: dict[str, Any]) -> str:
    epochs = tuned["epochs"]
    how = f"tuned on {tuned['tokens']:,} tokens" if "tokens" in tuned else f"trained for {epochs} epoch{'s' * (epochs != 1)}"
    lora = f" by lora of rank {tuned['lora']['rank']}" if "lora" in tuned else ""
    rate = f", {from_rate(tuned['rates'][-1])}" if tuned.get("rates") else ""
    return f"weights {how}{lora}{rate}"


def show_offloaded(result: dict[str, Any]) -> None:
    """Of a model that was pruned from files to files."""
    counts, facts, shares, exported = result["parameters"], result["layerwise"], result["achieved"], result["export"]
    print(f"compress: {result['model']}, {counts['total']:,} parameters, {result['task']}, a block at a time from its files")
    new = "; kept weights have new values" if facts["changes"] else ""
    print(
        f"layer by layer: {result['method']}, from {facts['samples']:,} training samples{new}; {result['structure']}, "
        f"{100 * shares['prunable']:.1f} % of the prunable parameters removed, {100 * shares['all']:.1f} % of all"
    )
    _refused(result["refused"])
    for note in exported["notes"]:
        print(f"  note: {note}")
    for measure in shown(result["measures"]):
        dense, pruned = (measure.text(result[name][measure.name]) for name in ("dense", "pruned"))
        print(f"{measure.label} on {result['test_samples']:,} test samples: dense {dense}, pruned {pruned}")
    folder = exported["folder"]
    print(f"{folder} holds the smaller model{again(exported['reused'])}: {exported['loads_with']}({folder!r})")


def _refused(refused: dict[str, str]) -> None:
    if refused:
        name, why = next(iter(refused.items()))
        print(f"  left whole: {name}: {why}{f' (and {len(refused) - 1} more)' if len(refused) > 1 else ''}")


def show_foreseen(found: dict[str, Any]) -> None:
    samples = ", ".join(f"{count:,} {name}" for name, count in found["samples"].items())
    print(f"compress would take {found['model']}, {found['parameters']:,} parameters, {found['task']}; samples: {samples}")
    print("steps, each of which can be called alone, and the seconds that they would take:")
    for verb, command in found["commands"].items():
        most = " at most" if verb in found["at_most"] else ""
        print(f"  {found['seconds'][verb]:6.1f}{most}  {command}")
    print(f"time: about {_time(sum(found['seconds'].values()))}, from what passes and gradients of a few samples take")
    memory, disk, whole = found["memory"], found["disk"], found["whole"]
    parts = ", ".join(f"{name} {_bytes(count)}" for name, count in memory["parts"].items() if count)
    print(
        f"memory: about {_bytes(memory['all'])} beside the batches: two models {_bytes(memory['models'])}"
        + (f", and in {memory['verb']} {parts}" if parts else "")
    )
    print(
        f"disk: about {_bytes(disk['all'])}: run folder {_bytes(disk['run'])}, smaller model {_bytes(disk['model'])} at most; "
        f"{_bytes(disk['free'])} are free"
    )
    names = whole["names"]
    listed = f" ({', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''})" if names else ""
    share = 100 * whole["parameters"] / found["parameters"]
    print(f"cannot be cut: {whole['parameters']:,} of {found['parameters']:,} parameters, {share:.1f} %{listed}")
    _refused(whole["refused"])
    if whole["missed"]:
        print(f"  {whole['missed']}")
    if whole["removed"]:
        print(
            f"would remove, by magnitude: {100 * whole['removed']['prunable']:.1f} % of the prunable, "
            f"{100 * whole['removed']['all']:.1f} % of all parameters"
        )
    if found["no_config"]:
        print(
            f"no config of transformers would say that model's shapes ({found['no_config']}): prunekit.load_hf would load it, "
            "from_pretrained would not"
        )
    print("nothing was written")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
