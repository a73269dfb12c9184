"""hf: a folder that transformers' own ``from_pretrained`` loads, wherever a config can say the pruned model's shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import batch
from prunekit.apply.manifest import PRUNED, write_weights
from prunekit.errors import UsageError, quoted, theirs
from prunekit.exporting.card import card, measured, removed
from prunekit.exporting.companions import copy_companions, largest_shard, source_of
from prunekit.exporting.config_shapes import saying, without_skipped
from prunekit.exporting.pretrained import is_pretrained, load_hf
from prunekit.exporting.same import answered, compare
from prunekit.exporting.state_dict import check_tensors
from prunekit.exporting.subject import Format, Subject, Written
from prunekit.huggingface import quietly

TOLERANCE = 1e-5
ALL = 2**62
"""Bytes of a file of weights where they came in one."""


def write(subject: Subject, folder: Path) -> Written:
    """Writes the folder, loads it as its reader will, and compares.

    Raises:
        UsageError: it is no model of transformers, or transformers does not save or load it.
        ArtifactError: what was loaded computes something else.
    """
    model: Any = subject.model
    cut = subject.vocabulary
    if not is_pretrained(model):
        raise UsageError(
            f"the model is a {type(model).__name__} and none of transformers'; export it to state-dict, onnx or torch-export"
        )
    source = source_of(model)
    written = model if cut is None else cut.model
    inputs = subject.inputs if cut is None or subject.inputs is None else cut.renumbered(subject.inputs)
    with theirs("transformers"), quietly():
        config, why = saying_of(written)
        if config is not None:
            _save(written, config, folder, largest_shard(source))
        elif cut is not None:
            raise UsageError(f"used_tokens needs a model whose shapes its config says ({why}); prune with --uniform")
        else:
            _save_beside(subject, folder)
    kind = type(model).__name__
    notes = []
    if config is None:
        notes.append(
            f"no config of transformers says this model's shapes ({why}): prunekit.load_hf loads it, from_pretrained does not"
        )
    if not copy_companions(source, folder):
        notes.append("no tokenizer or processor came along: the model came from no folder of this machine that has one")
    if cut is not None:
        notes.append(cut.write(folder))
    loading = (
        f'import transformers\n\nmodel = transformers.{kind}.from_pretrained("DIR")'
        if config is not None
        else 'import prunekit\n\nmodel = prunekit.load_hf("DIR")'
    )
    with theirs("transformers, loading what was written,"), quietly():
        back: Any = load_hf(folder) if config is None else _loaded(written, folder)
    loads = "prunekit.load_hf" if config is None else f"transformers.{kind}.from_pretrained"
    if config is not None:
        notes += _with_a_cache_that_fits(back, inputs, folder)
    (folder / "README.md").write_text(
        card(loading, notes, removed(subject.manifest), measured(subject.manifest, subject.evaluation)), encoding="utf-8"
    )
    with without_skipped(written) if config is not None else nullcontext():
        check_tensors(back.state_dict(), written, folder)
    if subject.inputs is None:
        return Written(loads, notes=notes)
    expected = answered(model, subject.inputs)
    off = compare(answered(back, inputs), expected if cut is None else cut.kept(expected), TOLERANCE, f"{loads}(DIR)")
    return Written(loads, TOLERANCE, off, [batch.size(subject.inputs)], notes)


def _with_a_cache_that_fits(back: Any, inputs: Any, folder: Path) -> list[str]:
    """Turns the cache off where an encoder-decoder's is not as deep as its decoder; what is to be said of ``generate``."""
    name = getattr(back, "main_input_name", "")
    if not (back.can_generate() and back.config.is_encoder_decoder and isinstance(inputs, Mapping) and name in inputs):
        return []
    try:
        with quietly():
            back.generate(inputs[name][:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    except IndexError:
        back.generation_config.use_cache = False
        back.generation_config.save_pretrained(folder)
        return ["generate() runs without its cache, which transformers makes as deep as the encoder, now less deep"]
    except Exception as error:  # a config that says no first token, for example
        return [f"generate() could not be tried: {quoted(error)}"]
    return []


def saying_of(model: Any) -> tuple[Any, str]:
    """The config that says the pruned model's shapes; see ``config_shapes.saying``."""
    if not type(model).__module__.startswith("transformers."):
        return None, f"{type(model).__name__} is no class of transformers' own"
    return saying(model)


def _save(model: Any, config: Any, folder: Path, shard: int | None) -> None:
    """Has transformers write the model with another config."""
    own = model.config
    with without_skipped(model):
        model.config = config
        try:
            model.save_pretrained(folder, max_shard_size=ALL if shard is None else shard)
        finally:
            model.config = own


def _save_beside(subject: Subject, folder: Path) -> None:
    """The dense model's config, the pruned weights, and what prunekit makes the one into the other by."""
    model: Any = subject.model
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    manifest = subject.known_plan("hf, where no config says the model's shapes,")
    manifest = replace(manifest, files={PRUNED: write_weights(model, manifest, folder / PRUNED)})
    manifest.save(folder / "prunekit.json")


def _loaded(model: Any, folder: Path) -> nn.Module:
    """The model as ``from_pretrained`` gives it.

    Raises:
        UsageError: it left something out.
    """
    back, told = type(model).from_pretrained(
        folder,
        dtype="auto",
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(kind):
            raise UsageError(f"from_pretrained reports {kind} ({sorted(map(str, told[kind]))[0]}); nothing was written")
    found: nn.Module = back.eval()
    return found


FORMAT = Format(write, "a folder that from_pretrained loads")
