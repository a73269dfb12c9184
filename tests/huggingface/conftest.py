"""Small models of transformers in folders, as ``save_pretrained`` writes them, and data for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.zoo.operators import declare
from tests.cli.conftest import cli, few

__all__ = ["cli", "few"]

declare()
transformers = pytest.importorskip("transformers")
ENCODER = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**ENCODER, **TOKENS, "num_key_value_heads": 2, "tie_word_embeddings": True}
GPT2 = {**TOKENS, "vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**ENCODER, "num_labels": 3}),
    "base": ("BertModel", "BertConfig", ENCODER),
    "asked": ("BertForQuestionAnswering", "BertConfig", ENCODER),
    "masked": ("BertForMaskedLM", "BertConfig", ENCODER),
    "tokens": ("BertForTokenClassification", "BertConfig", {**ENCODER, "num_labels": 3}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
SIZES = {"train": 48, "validation": 24, "test": 24, "scoring": 16}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """``save("bert", config={...}, dtype=..., **how)`` -> a folder that holds such a model, initialised from a seed."""

    def saved(
        kind: str, name: str | None = None, seed: int = 0, dtype: torch.dtype | None = None, config: Any = None, **how: Any
    ) -> Path:
        model, settings, options = MODELS[kind]
        torch.manual_seed(seed)
        made = getattr(transformers, model)(getattr(transformers, settings)(**{**options, **(config or {})}))
        place = tmp_path / (name or kind)
        made.to(dtype or torch.float32).save_pretrained(place, **how)
        return place

    return saved


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with ``classes``, labelled by their first token, and ``texts``, which are their own labels."""

    def made(labels: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        found = {}
        for seed, (name, size) in enumerate(SIZES.items()):
            ids = torch.randint(4, 64, (size, 8), generator=torch.Generator().manual_seed(seed))
            found[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}
        return found

    module = ModuleType("words_of_tests")
    module.classes = lambda: made(lambda ids: ids[:, 0] % 3)  # type: ignore[attr-defined]
    module.texts = lambda: made(lambda ids: ids)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__
