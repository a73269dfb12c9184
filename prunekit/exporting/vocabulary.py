"""A model of transformers without the tokens that its data never use: rows of its embedding and output, and its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import batch, bounded
from prunekit.batch import Batch, Inputs
from prunekit.data.files.options import Options
from prunekit.data.files.processors import home_of
from prunekit.errors import ArtifactError, UsageError
from prunekit.exporting import tokenizer_rows
from prunekit.exporting.companions import source_of
from prunekit.exporting.config_shapes import parts_of
from prunekit.exporting.pretrained import is_pretrained
from prunekit.exporting.token_numbers import TOKENS, ids_in, renumbered, token_tensors, write_mapping
from prunekit.trajectory.copies import copied

OLD = ("vocab.*", "merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json")
"""Other forms of the tokenizer, with the old numbers; tokenizer.json says all that they do."""
SHOWN, AT_ONCE = 4096, 512  # samples whose tokens are made into texts again where the texts are unknown; texts at once


@dataclass(frozen=True)
class Vocabulary:
    """What is left of a model's vocabulary.

    Attributes:
        model: a copy of the pruned model with the rows that stay, and its config; it is written, not called.
        stays: the old numbers of the tokens that stay, in order: the new number is the place here.
        before: rows that there were.
        source: folder of the old tokenizer.
        texts: of the data, as they were tokenized.
    """

    model: Any
    stays: Tensor
    before: int
    source: Path
    texts: Sequence[str]

    @property
    def places(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.stays.tolist())}

    def renumbered(self, inputs: Inputs) -> Inputs:
        """The same inputs under the new numbers."""
        table = torch.full((self.before,), -1)
        table[self.stays] = torch.arange(len(self.stays))

        def new(tokens: Tensor) -> Tensor:
            return torch.where(tokens < 0, tokens, table[tokens.clamp(min=0)]).to(tokens.dtype)

        if isinstance(inputs, Mapping):
            return {name: new(value) if name in TOKENS else value for name, value in inputs.items()}
        return new(inputs) if isinstance(inputs, Tensor) else type(inputs)([new(inputs[0]), *inputs[1:]])

    def kept(self, answers: Sequence[Tensor]) -> list[Tensor]:
        """The pruned model's answers where they are about tokens that stay."""
        return [one[..., self.stays] if one.dim() and one.shape[-1] == self.before else one for one in answers]

    def write(self, folder: Path) -> str:
        """Brings the tokenizer in ``folder`` to the new numbers, and compares it with the old one on the data's texts.

        Returns:
            a sentence on what stays.

        Raises:
            ArtifactError: a text has other tokens than before.
        """
        for pattern in OLD:
            for path in folder.glob(pattern):
                path.unlink()
        places = self.places
        content = tokenizer_rows.read(self.source / "tokenizer.json")
        write_mapping(folder / "tokenizer.json", tokenizer_rows.smaller(content, places))
        for name in ("tokenizer_config.json", "generation_config.json"):
            if (path := folder / name).is_file():
                found = renumbered(bounded.mapping(path), places)
                if "added_tokens_decoder" in found:
                    old = found["added_tokens_decoder"].items()
                    found["added_tokens_decoder"] = {str(places[int(n)]): one for n, one in old if int(n) in places}
                write_mapping(path, found)
        texts = self._compare(folder)
        return (
            f"of {self.before:,} tokens {len(self.stays):,} stay, those that the data never use are gone (used_tokens); "
            "sizes and figures of the pruned model are those with all tokens; "
            f"the new tokenizer gives {texts:,} of the data's {len(self.texts):,} texts the same tokens"
            + ("" if texts == len(self.texts) else "; the others hold tokens that the data as they are read (cut, masked) do not")
        )

    def _compare(self, folder: Path) -> int:
        """How many texts were compared: those of which every token stays, as long as they were not cut."""
        before, after = (home_of(None, Options(tokenizer=str(one))).processor("text") for one in (self.source, folder))
        places, same = self.places, 0
        for old, new in places.items():
            if old < len(before) and before.convert_ids_to_tokens(old) != after.convert_ids_to_tokens(new):
                raise ArtifactError(
                    f"the tokenizer, read back, has {after.convert_ids_to_tokens(new)!r} in the place of "
                    f"{before.convert_ids_to_tokens(old)!r}; nothing was written"
                )
        for begin in range(0, len(self.texts), AT_ONCE):
            asked = list(self.texts[begin : begin + AT_ONCE])
            was, now = (one(asked, return_attention_mask=False, verbose=False)["input_ids"] for one in (before, after))
            for text, old_ids, new_ids in zip(asked, was, now, strict=True):
                if all(token in places for token in old_ids):
                    same += 1
                    if [places[token] for token in old_ids] != list(new_ids):
                        raise ArtifactError(
                            f"the text {text[:40]!r} has other tokens without those that the data never use; nothing was written"
                        )
        return same


def vocabulary_of(model: Any, data: Iterable[Batch], texts: Sequence[str] | None = None) -> Vocabulary:
    """A pruned model's vocabulary with the tokens that ``data`` use, special and added tokens, and what other texts need.

    Args:
        data: all batches ``(inputs, labels)``.
        texts: the same as they were tokenized; None where that is unknown: tokens are made into texts again.

    Raises:
        UsageError: the model or its tokenizer is of a kind whose tokens cannot go; says which.
    """
    if not is_pretrained(model) or (source := source_of(model)) is None:
        raise UsageError("used_tokens needs a model of transformers that was loaded from a folder with its tokenizer.json")
    content = tokenizer_rows.read(source / "tokenizer.json")
    before = getattr(model.config, "vocab_size", None)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.num_embeddings != before or len(_sizes(model.config)) != 1:
        raise UsageError(f"used_tokens: the config of {type(model).__name__} has no vocab_size of its one embedding")
    most = max(tokenizer_rows.numbers(content).values(), default=-1)
    if most >= before:
        raise UsageError(f"{source}/tokenizer.json: has token {most}, and the model's vocab_size is {before}")
    _check_rows(model, embedding, output, before)
    generation = bounded.mapping(path) if (path := source / "generation_config.json").is_file() else {}
    said = {one for part in [*map(vars, parts_of(model.config)), generation] for one in ids_in(part)}
    if model.can_generate():
        said |= set(ids_in(vars(model.generation_config)))
    used = torch.zeros(before, dtype=torch.bool)
    rows: list[list[int]] = []
    for inputs, labels in data:
        asked = batch.leaves(labels) if output is not None else []
        for tokens in [*token_tensors(inputs), *(each for each in asked if not each.is_floating_point())]:
            if int(tokens.max()) >= before:
                raise UsageError(f"used_tokens: the data have token {int(tokens.max())}, and the model's vocab_size is {before}")
            used[tokens[tokens >= 0].long()] = True
        rows += token_tensors(inputs)[0].tolist()[: SHOWN - len(rows)] if texts is None else []
    wanted = {*torch.nonzero(used).flatten().tolist(), *(one for one in said if 0 <= one < before)}
    stays = torch.tensor(sorted(tokenizer_rows.staying(content, wanted) | wanted))
    if texts is None:
        tokenizer = home_of(None, Options(tokenizer=str(source))).processor("text")
        texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    found = Vocabulary(copied(model), stays, before, source, texts)
    _cut(found)
    return found


def _check_rows(model: Any, embedding: nn.Module, output: nn.Module | None, rows: int) -> None:
    """Raises UsageError where a tensor beside embedding and output has the vocabulary's size."""
    own = [getattr(each, name, None) for each in (embedding, output) for name in ("weight", "bias")]
    known = {each.data_ptr() for each in own if each is not None}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if rows in shape and (tensor.data_ptr() not in known or shape[0] != rows or shape.count(rows) > 1):
            raise UsageError(f"used_tokens: {name} is {shape}, of the vocabulary's size, and neither embedding nor output")


def _cut(found: Vocabulary) -> None:
    """Takes the rows that go out of the copy, and renumbers what its config says."""
    model, new = found.model, {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and tensor.dim() and len(tensor) == found.before:
                    if (place := tensor.data_ptr()) not in new:  # tied ones stay one
                        rows = tensor.detach()[found.stays].clone()
                        new[place] = nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows
                    kind[name] = new[place]
        for attribute in ("num_embeddings", "out_features"):
            if getattr(module, attribute, None) == found.before:
                setattr(module, attribute, len(found.stays))
    model.config = copy.deepcopy(model.config)
    for part in parts_of(model.config):
        for name, value in renumbered(vars(part), found.places).items():
            if vars(part)[name] != value:
                setattr(part, name, value)
    model.config.vocab_size = len(found.stays)


def _sizes(config: Any) -> list[int]:
    return [vars(part)["vocab_size"] for part in parts_of(config) if "vocab_size" in vars(part)]
