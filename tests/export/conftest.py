"""Tiny models of transformers, pruned in every way that their configs can and cannot say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.operators import declare
from prunekit import Plan, Trajectory, make_plan, prune, score

VOCABULARY = 40


def tokens(samples: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def transformers() -> Any:
    declare()
    return pytest.importorskip("transformers")


def llama() -> nn.Module:
    """Grouped queries, tied embeddings."""
    config = transformers().LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers().LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers().GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers().GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    config = transformers().BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return transformers().BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    config = transformers().T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers().T5ForConditionalGeneration(config).eval()


def pruned(
    model: nn.Module,
    inputs: Any,
    structure: str,
    ignore: tuple[str, ...] = (),
    sparsity: float = 0.25,
    allocation: str = "global",
    round_to: int = 1,
) -> tuple[nn.Module, Plan]:
    """By magnitude."""
    scores = score(Trajectory.of(model), model, criterion="magnitude", ignore=ignore)
    example = None if structure == "unstructured" else inputs
    plan = make_plan(scores, model, example, sparsity=sparsity, structure=structure, allocation=allocation, round_to=round_to)
    return prune(model, plan, example), plan
