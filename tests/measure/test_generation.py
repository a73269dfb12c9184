"""Tokens a second: what is timed is what plain code with and without a cache computes, and what cannot be timed is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit.measure import generation as room
from prunekit.measure.generation import fitted, generation, places
from tests.transformer_models import built

PROMPT, TOKENS = 6, 4


@pytest.fixture
def text() -> Tensor:
    return torch.randint(3, 40, (50,))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_models_with_a_cache_read_and_write(family: str, text: Tensor) -> None:
    model, other = (built(family)[0] for _ in range(2))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = generation({"dense": model, "pruned": other}, text, PROMPT, TOKENS, [1, 3])
    assert "why" not in found
    for size, pace in found["batches"].items():
        assert pace["rounds"] >= 1
        for rates in (pace["prefill"], pace["decode"]):
            assert set(rates) == {"dense", "pruned", "speedup"}
            assert all(0 < each["low"] <= each["median"] <= each["high"] for each in rates.values())
        heads = 2 if family == "llama" else 4
        keys_and_values = 2 * model.config.num_hidden_layers * int(size) * heads * (PROMPT + TOKENS) * (16 // 4) * 4
        assert found["memory"]["dense"]["cache"][size] == keys_and_values
    unique = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    assert found["memory"]["dense"]["weights"] == sum(unique.values())
    assert "prefill_peak" not in found["memory"]["dense"]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_steps_are_those_of_greedy_decoding_without_a_cache(text: Tensor) -> None:
    model, _ = built("llama")
    given = text[: 2 * PROMPT].view(2, PROMPT)
    with torch.no_grad():
        answer = model(**room._arguments(model, given, cached=True))
        written = torch.cat([token for token, _ in room._written(model, answer, TOKENS)], 1)
        ids = given
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids[:, PROMPT:])


class Tokens(nn.Module):
    """No model of transformers: logits of tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(40, 8), nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x))


def test_without_a_cache_only_the_prefill_is_timed_and_the_reason_is_said(text: Tensor) -> None:
    found = generation({"dense": Tokens(), "pruned": Tokens()}, text, PROMPT, TOKENS, [2])
    assert set(found["batches"]["2"]) == {"prefill", "rounds"}
    assert found["why"] == "decoding is left out: Tokens.forward takes no input_ids, so it has no cache"
    assert set(found["memory"]["dense"]) == {"weights"}


def test_a_cache_that_changes_the_answer_is_not_timed(text: Tensor) -> None:
    right, wrong = (built("llama")[0] for _ in range(2))
    plain = wrong.model.forward

    def forgetful(*given: Any, **named: Any) -> Any:
        if named.get("cache") is not None or named.get("past_key_values") is not None:
            named["position_ids"] = torch.zeros_like(named["input_ids"])
        return plain(*given, **named)

    wrong.model.forward = forgetful
    found = generation({"dense": right, "pruned": wrong}, text, PROMPT, TOKENS, [1])
    assert "LlamaForCausalLM answers otherwise with its cache: logits of token 10 are" in found["why"]
    assert "decode" not in found["batches"]["1"]
    assert found["batches"]["1"]["prefill"]


def test_what_fails_is_left_out_with_its_reason(text: Tensor) -> None:
    class Fails(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError("out of room")
            return super().forward(x)

    found = generation({"dense": Fails()}, text, PROMPT, TOKENS, [1, 2])
    assert set(found["batches"]) == {"1"}
    assert "batch 2 is left out: RuntimeError: out of room" in found["why"]


def test_few_positions_make_prompts_shorter() -> None:
    assert fitted(128, 32, None) == (128, 32)
    assert fitted(128, 32, 160) == (128, 32)
    assert fitted(128, 32, 128) == (96, 32)
    assert fitted(128, 32, 16) == (12, 4)
    assert fitted(5, 32, 16) == (5, 4)
    assert places(built("gpt2")[0]) == 32
    assert places(Tokens()) is None
