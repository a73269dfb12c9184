"""transformers' families, by small configurations; batches are the mappings that its tokenizers and collators give."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import CLASSES, NO_LOSS, Entry, splits, tokens
from benchmarks.zoo.operators import declare

NEEDS = ("transformers",)


def _made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """``model(config(**options))`` by their names in transformers."""

    def build() -> nn.Module:
        declare()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def _encoder(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 32, **more,
    }  # fmt: skip


def _decoder(**more: Any) -> dict[str, Any]:
    return _encoder(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)


DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32}
GPT2 = {
    "vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_layers": 1, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 16, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAV2VEC2 = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_labels": CLASSES, "classifier_proj_size": 16,
    "layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip


def _pictures(n: int, g: torch.Generator) -> dict[str, Tensor]:
    y = torch.randint(0, CLASSES, (n,), generator=g)
    return {"pixel_values": torch.randn(n, 3, 32, 32, generator=g) + 0.5 * y.view(-1, 1, 1, 1), "labels": y}


def _sounds(n: int, g: torch.Generator) -> dict[str, Tensor]:
    y = torch.randint(0, CLASSES, (n,), generator=g)
    return {"input_values": torch.randn(n, 400, generator=g) * (1 + y.view(-1, 1)), "labels": y}


def _spectra(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(n, 8, 32, generator=g)}


def _captioned(n: int, g: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(4, 63, (n, 8), generator=g)
    ids[:, -1] = 63  # CLIP reads a sentence at its end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(n, 3, 32, 32, generator=g)}


def _whisper_encoder() -> nn.Module:
    return _made("WhisperModel", "WhisperConfig", **WHISPER)().get_encoder()


def _clip() -> nn.Module:
    declare()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    text = _encoder(eos_token_id=63, bos_token_id=62, pad_token_id=0)
    vision = {key: value for key, value in VIT.items() if key != "num_labels"}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _entry(
    model: str, config: str, options: dict[str, Any], labels: str, task: str = "classification", fast: bool = False
) -> Entry:
    return Entry(_made(model, config, **options), tokens(labels), task, packages=NEEDS, fast=fast)


LABELLED = {"num_labels": CLASSES}
MODELS = {
    "hf_bert": _entry("BertForSequenceClassification", "BertConfig", _encoder(**LABELLED), "class"),
    "hf_bert_tokens": _entry(
        "BertForTokenClassification", "BertConfig", _encoder(**LABELLED), "token", "token_classification"
    ),
    "hf_bert_masked": _entry("BertForMaskedLM", "BertConfig", _encoder(), "masked", "masked_lm"),
    "hf_distilbert": _entry("DistilBertForSequenceClassification", "DistilBertConfig", {**DISTIL, **LABELLED}, "class"),
    "hf_distilbert_tokens": _entry(
        "DistilBertForTokenClassification", "DistilBertConfig", {**DISTIL, **LABELLED}, "token", "token_classification"
    ),
    "hf_roberta": _entry("RobertaForSequenceClassification", "RobertaConfig", _encoder(**LABELLED), "class"),
    "hf_roberta_tokens": _entry(
        "RobertaForTokenClassification", "RobertaConfig", _encoder(**LABELLED), "token", "token_classification"
    ),
    "hf_gpt2": _entry("GPT2LMHeadModel", "GPT2Config", GPT2, "lm", "causal_lm"),
    "hf_llama": _entry("LlamaForCausalLM", "LlamaConfig", _decoder(), "lm", "causal_lm", fast=True),
    "hf_qwen": _entry("Qwen2ForCausalLM", "Qwen2Config", _decoder(), "lm", "causal_lm"),
    "hf_mistral": _entry("MistralForCausalLM", "MistralConfig", _decoder(), "lm", "causal_lm"),
    "hf_mixtral": _entry(
        "MixtralForCausalLM", "MixtralConfig", _decoder(num_local_experts=4, num_experts_per_tok=2), "lm", "causal_lm"
    ),
    "hf_t5": _entry("T5ForConditionalGeneration", "T5Config", T5, "seq2seq", "seq2seq"),
    "hf_vit": Entry(_made("ViTForImageClassification", "ViTConfig", **VIT), lambda: splits(_pictures), packages=NEEDS),
    "hf_whisper_encoder": Entry(
        _whisper_encoder, lambda: splits(_spectra), "unlabelled", senseless=NO_LOSS, packages=NEEDS
    ),
    "hf_clip": Entry(
        _clip, lambda: splits(_captioned), "unlabelled", senseless=NO_LOSS, packages=NEEDS, options={"output": "image_embeds"}
    ),
    "hf_wav2vec2": Entry(
        _made("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **WAV2VEC2), lambda: splits(_sounds), packages=NEEDS
    ),
}  # fmt: skip
