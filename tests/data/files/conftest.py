"""Folders of small models with tokenizers that are made here, and files of data for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.operators import declare

declare()
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

WORDS = [
    *("the", "a", "good", "bad", "film", "was", "is", "story", "plot"),
    *("fine", "awful", "great", "boring", "lovely", "weak", "strong", "end", "scene"),
]
ENCODER = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
Home = Callable[..., Path]
Write = Callable[..., Path]


def reviews(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that are all different, each with a label, ``neg`` or ``pos``."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        found[" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 9)))] = ("neg", "pos")[len(found) % 2]
    return [{"text": text, "label": label} for text, label in found.items()]


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """``words``, of whole words with special tokens around them; ``bytes``, of bytes and pairs of them, without padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*special, *WORDS, "##s"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces.train_from_iterator([row["text"] for row in reviews()], trainer)
    fast = transformers.PreTrainedTokenizerFast
    around = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return {
        "words": fast(tokenizer_object=words, model_input_names=names, **around),
        "bytes": fast(tokenizer_object=pieces, eos_token="<eos>"),
    }


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]) -> Home:
    """``home("bert", num_labels=3)`` -> a folder with such a model's config and tokenizer; ``weights=True``: the model too."""

    def made(kind: str, weights: bool = False, **more: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        name, config, tokenizer = {
            "bert": ("BertForSequenceClassification", "BertConfig", "words"),
            "tags": ("BertForTokenClassification", "BertConfig", "words"),
            "masked": ("BertForMaskedLM", "BertConfig", "words"),
            "llama": ("LlamaForCausalLM", "LlamaConfig", "bytes"),
        }[kind]
        size = {"vocab_size": 280, "num_key_value_heads": 1, "eos_token_id": 0, "bos_token_id": 0} if kind == "llama" else {}
        settings = getattr(transformers, config)(**{**ENCODER, **size, **more}, architectures=[name])
        if weights:
            torch.manual_seed(0)
            getattr(transformers, name)(settings).save_pretrained(folder)
        else:
            settings.save_pretrained(folder)
        tokenizers[tokenizer].save_pretrained(folder)
        return folder

    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("a.jsonl", rows)`` -> a file of these mappings, or of text."""

    def written(name: str, content: Any, folder: str = "data") -> Path:
        place = tmp_path / folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            place.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
        return place

    return written
