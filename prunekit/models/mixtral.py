"""A small Mixtral with weights of its own: what ``recipes/lm-comparison/small-mixtral.yaml`` trains."""

from __future__ import annotations

from torch import nn

from prunekit.errors import UsageError
from prunekit.imports import needed


def mixtral(
    vocabulary: int = 1024,
    width: int = 96,
    layers: int = 3,
    heads: int = 6,
    kv_heads: int = 2,
    hidden: int = 128,
    experts: int = 8,
    chosen: int = 2,
    length: int = 128,
) -> nn.Module:
    """Tokens ``(samples, places)`` to ``logits`` ``(samples, places, vocabulary)``; 1,059,744 parameters at the default size.

    It is transformers' ``MixtralForCausalLM`` (extra ``hf``), made from its configuration; nothing is downloaded. A token goes
    to the ``chosen`` experts that a layer's router gives most, gated MLPs of width ``hidden``. The output layer is the embedding.

    Raises:
        UsageError: heads do not divide the width, kv_heads do not divide the heads, there are fewer experts than a token goes
            to, or transformers is missing.
    """
    sizes = (vocabulary, width, layers, heads, kv_heads, hidden, experts, chosen, length)
    if min(sizes) < 1 or width % (2 * heads) or heads % kv_heads or chosen > experts:
        raise UsageError(
            f"mixtral: width {width} must be a multiple of twice its {heads} heads, heads one of its {kv_heads} kv_heads, and "
            f"{experts} experts no fewer than the {chosen} that a token goes to; no size may be below 1"
        )
    transformers = needed("transformers")
    config = transformers.MixtralConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=chosen,
        max_position_embeddings=length, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    made: nn.Module = transformers.MixtralForCausalLM(config)
    return made
