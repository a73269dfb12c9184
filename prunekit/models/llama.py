"""A small Llama with weights of its own: what ``recipes/stdlib-llama.yaml`` trains."""

from __future__ import annotations

from torch import nn

from prunekit.errors import UsageError
from prunekit.imports import needed


def llama(
    vocabulary: int = 2048,
    width: int = 192,
    layers: int = 4,
    heads: int = 6,
    kv_heads: int = 2,
    hidden: int = 512,
    length: int = 128,
    tied: bool = True,
) -> nn.Module:
    """Tokens ``(samples, places)`` to ``logits`` ``(samples, places, vocabulary)``; 1,967,808 parameters at the default size.

    It is transformers' ``LlamaForCausalLM`` (extra ``hf``), made from its configuration; nothing is downloaded.

    Args:
        kv_heads: keys and values, each shared by ``heads / kv_heads`` queries.
        hidden: width of the gated MLP.
        length: the most places.
        tied: the output layer is the embedding.

    Raises:
        UsageError: heads do not divide the width, kv_heads do not divide the heads, or transformers is missing.
    """
    if min(vocabulary, width, layers, heads, kv_heads, hidden, length) < 1 or width % (2 * heads) or heads % kv_heads:
        raise UsageError(
            f"llama: width {width} must be a multiple of twice its {heads} heads, and heads one of its {kv_heads} kv_heads; no "
            "size may be below 1"
        )
    transformers = needed("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=hidden, max_position_embeddings=length, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config)
    return made
