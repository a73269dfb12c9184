"""What trajectory.json says while a recording begins, goes on with other processes, and ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import checkpoint
from prunekit.errors import UsageError
from prunekit.trajectory.layout import Layout
from prunekit.trajectory.parts import STREAMS, part_json, parts_of, rank_folder, trimmed
from prunekit.trajectory.proof import LOG, seal
from prunekit.trajectory.shards import Share
from prunekit.trajectory.store import DTYPES, joint_hash
from prunekit.trajectory.tape import Place

ALONE = "a training of its own in one process takes alone=True"
AGREEMENT = {
    "folder": f"records into {{mine}}, process 0 into {{first}}; give all of them the same folder ({ALONE})",
    "options": "records with {mine}, process 0 with {first}; give all of them the same options",
    "layout": "trains another model than process 0: names, shapes or what is frozen differ",
    "optimizer": "trains by another optimizer than process 0, or with other hyperparameters; make the same one in all of them",
    "spread": "holds the model in another way than process 0: call fully_shard in all of them, or in none",
    "weights": "begins from other weights than process 0, which averaged gradients never make one model; wrap it in "
    f"DistributedDataParallel, or build it from one seed ({ALONE})",
}
"""By fact, what is wrong where a process has another one."""


def facts_of(
    folder: Path, model: nn.Module, share: Share, optimizer: Mapping[str, Any], options: Mapping[str, Any], size: int
) -> dict[str, Any]:
    """What one of ``size`` processes is about to record, for ``agree_on``."""
    own = {name: parameter for name, parameter in model.named_parameters() if size > 1 and not share.sharded}
    return {
        "folder": str(folder.absolute()),
        "options": dict(options),
        "layout": share.whole.to_json(),
        "optimizer": dict(optimizer),
        "spread": share.sharded,
        "spans": share.spans,
        "weights": checkpoint.tensor_checksum(own),
    }


def agree_on(facts: Sequence[Mapping[str, Any]]) -> None:
    """Compares what the processes are about to record.

    Raises:
        UsageError: one would record something else; names it.
    """
    for key, text in AGREEMENT.items():
        for rank, one in enumerate(facts):
            if one[key] != facts[0][key]:
                raise UsageError(f"Recorder: process {rank} " + text.format(mine=one[key], first=facts[0][key]))


def go_on_in(header: dict[str, Any], spans: Sequence[Any] | None, resumed: Mapping[str, Any], total: int) -> bool:
    """Brings the parts of ``header`` to where a recording goes on; whether a new one begins there, of other processes.

    Args:
        spans: of each process, its coordinates; None where one writes all of ``total``.
        resumed: ``rows`` and ``lines`` that stay.
    """
    every: list[list[list[int]]] = [[[0, total]]] if spans is None else [[list(span) for span in one] for one in spans]
    parts = header.get("parts") or [part_json(None, {}, 0)]
    while len(parts) > 1 and parts[-1]["lines"] >= resumed["lines"]:
        parts.pop()
    parts[-1].pop("files", None)
    new = (parts[-1]["spans"] or [[[0, total]]]) != every
    if new:
        parts.append(part_json(every, resumed["rows"], resumed["lines"]))
    if len(parts) > 1 or parts[0]["spans"] is not None:
        header["parts"] = parts
    return new


def place_in(folder: Path, header: Mapping[str, Any], rank: int, resumed: Mapping[str, Any] | None) -> Place:
    """Where process ``rank`` writes."""
    parts = header.get("parts") or [part_json(None, {}, 0)]
    last, lines = parts[-1], 0 if resumed is None else int(resumed["lines"])
    own = folder if last["spans"] is None else rank_folder(folder, len(parts) - 1, rank)
    rows = {} if resumed is None else {name: resumed["rows"].get(name, 0) - last["rows"][name] for name in STREAMS}
    if rank == 0:
        return Place(own, folder / LOG, rows, lines, 0, last["rows"])
    return Place(own, own / LOG, rows, lines - last["lines"], last["lines"], last["rows"])


def seal_before(folder: Path, header: Mapping[str, Any], layout: Layout, rank: int, size: int) -> dict[str, dict[str, str]]:
    """Ends files of the last part but one, where a new one begins: by the number of the process that wrote them, their checksums.

    The processes of now deal those of then out among themselves.
    """
    *_, old, new = parts_of(folder, header, layout)
    found: dict[str, dict[str, str]] = {}
    for other, place in enumerate(old.local):
        if other % size == rank:
            counts = {name: new.rows[name] - old.rows[name] for name in STREAMS}
            if other:
                counts["random"] = 0
                _cut(place / LOG, new.lines - old.lines)
            finished = trimmed(place, header["states"], old.width(other), DTYPES[header["dtype"]], counts)
            found[str(other)] = seal(place, finished)
    return found


def ended(folder: Path, header: Mapping[str, Any], found: Sequence[Mapping[str, Any] | None], complete: bool) -> dict[str, Any]:
    """trajectory.json of a recording that has ended.

    Args:
        found: of each process, ``Tape.close``; None for those that write nothing.
    """
    wrote = [one for one in found if one is not None]
    log = {LOG: checkpoint.file_checksum(folder / LOG)}
    facts = {**header, "complete": complete, "steps": wrote[0]["steps"], "hash": joint_hash([one["hash"] for one in wrote])}
    if "parts" not in header:
        return {**facts, "files": wrote[0]["files"]}
    last = {**header["parts"][-1], "files": [one["files"] for one in wrote]}
    return {**facts, "parts": [*header["parts"][:-1], last], "files": log}


def _cut(log: Path, lines: int) -> None:
    with log.open("rb+") as file:
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())
