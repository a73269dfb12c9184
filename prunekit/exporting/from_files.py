"""A model of transformers whose weights lie in files, pruned there and written as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import batch
from prunekit.batch import Inputs
from prunekit.errors import theirs
from prunekit.exporting.card import card
from prunekit.exporting.companions import copy_companions
from prunekit.exporting.same import answered, compare
from prunekit.exporting.subject import Written
from prunekit.huggingface import load_model, quietly


def write_offloaded(
    model: Any,
    source: Path,
    folder: Path,
    shard: int,
    inputs: Inputs,
    spare: Path,
    told: Callable[[nn.Module], tuple[dict[str, Any], list[str], list[str]]],
) -> Written:
    """Writes the folder, loads it again without reading it whole, and compares.

    Args:
        model: pruned, with its weights in files (``load_model``'s ``offload``).
        source: the folder that it came from.
        shard: bytes of a file at most, which is what is in memory meanwhile; a tensor that is larger has its own.
        inputs: on which answers are compared.
        spare: a folder for what loading it again writes.
        told: of the model as it was loaded again: what export.json says of the pruning, and lines for the card, on what was
            removed and how it was measured.

    Raises:
        ArtifactError: what was loaded computes something else.
        UsageError: transformers does not save it.
    """
    with theirs("transformers"), quietly():
        model.save_pretrained(folder, max_shard_size=shard)
    notes = []
    if not copy_companions(source, folder):
        notes.append("no tokenizer or processor came along: the model came from a folder that has none")
    loads = f"transformers.{type(model).__name__}.from_pretrained"
    back = load_model(folder, offload=spare)
    off = compare(answered(back, inputs), answered(model, inputs), 0.0, f"{loads}(DIR)")
    pruning, removed, measured = told(back)
    loading = f'import transformers\n\nmodel = {loads}("DIR")'
    (folder / "README.md").write_text(card(loading, notes, removed, measured), encoding="utf-8")
    return Written(loads, 0.0, off, [batch.size(inputs)], notes, pruning=pruning)
