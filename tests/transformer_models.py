"""Tiny models of transformers' families, with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.operators import declare

WIDTH, LAYERS, HEADS, NEURONS = 16, 2, 4, 24
NAMED = {"hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TEXT = {**NAMED, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
T5 = {"vocab_size": 40, "d_model": WIDTH, "d_kv": 4, "d_ff": NEURONS, "num_layers": LAYERS, "num_heads": HEADS}
IMAGES = {**NAMED, "image_size": 8, "patch_size": 4}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", TEXT),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"vocab_size": 40, "dim": WIDTH, "hidden_dim": NEURONS, "n_layers": LAYERS, "n_heads": HEADS}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel",
             {"vocab_size": 40, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": NEURONS, "n_positions": 32}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**TEXT, "ffn_dim": NEURONS, "word_embed_proj_dim": WIDTH}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGES),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {"vocab_size": 40, "num_mel_bins": 8, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
                 "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": NEURONS,
                 "decoder_ffn_dim": NEURONS, "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0,
                 "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}),
    "clip": ("CLIPConfig", "CLIPModel",
             {"text_config": {**TEXT, "bos_token_id": 1}, "vision_config": IMAGES, "projection_dim": 8}),
}  # fmt: skip
"""Family -> names of its config and model, and the config."""


def built(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    declare()
    transformers = pytest.importorskip("transformers")
    config, kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = {
        "vit": {"pixel_values": pixels},
        "clip": {"input_ids": ids, "pixel_values": pixels},
        "t5": {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
        "whisper": {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": ids},
    }
    return model, found.get(family, {"input_ids": ids})


def first(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        answer = model(**inputs)
    found: torch.Tensor = answer.logits if hasattr(answer, "logits") else answer.logits_per_image
    return found
