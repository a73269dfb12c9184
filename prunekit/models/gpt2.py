"""A small GPT-2 with weights of its own: what ``recipes/lm-comparison/gpt2.yaml`` trains."""

from __future__ import annotations

from torch import nn

from prunekit.errors import UsageError
from prunekit.imports import needed


def gpt2(vocabulary: int = 2048, width: int = 192, layers: int = 4, heads: int = 6, length: int = 128) -> nn.Module:
    """Tokens ``(samples, places)`` to ``logits`` ``(samples, places, vocabulary)``; 2,197,632 parameters at the default size.

    It is transformers' ``GPT2LMHeadModel`` (extra ``hf``), made from its configuration without dropout; nothing is downloaded.
    The output layer is the embedding, and the MLP four times as wide as the model.

    Args:
        length: the most places, each with an embedding of its own.

    Raises:
        UsageError: heads do not divide the width, or transformers is missing.
    """
    if min(vocabulary, width, layers, heads, length) < 1 or width % heads:
        raise UsageError(f"gpt2: width {width} must be a multiple of its {heads} heads; no size may be below 1")
    transformers = needed("transformers")
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    made: nn.Module = transformers.GPT2LMHeadModel(config)
    return made
