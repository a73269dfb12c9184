"""How fast a language model reads a prompt and writes after it with its cache, and what memory that takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from prunekit.batch import called, device_of
from prunekit.errors import quoted
from prunekit.measure.latency import MOST, WARM_UP, Interval, Timing, timed
from prunekit.measure.size import in_memory
from prunekit.measure.undisturbed import undisturbed
from prunekit.traceless import traceless

SECONDS = 1.0
"""Of steps at one batch size, at most about, with six rounds at least."""
ROUNDS = 6.0
"""Seconds of rounds at one batch size beyond which there are fewer than six, one at least."""
SAME, SAME_HALF = 1e-4, 3e-2
"""Share of the largest logit by which the answer with the cache may differ from the one without, by rounding."""
CACHES = ("cache", "past_key_values", "cache_params")
"""Names under which models of transformers take and return a cache, by version and family."""


class Memory(TypedDict):
    """Bytes: the weights (parameters and buffers, tied ones once), and by batch size the cache after the last token.

    On CUDA also by batch size the most that a prefill and the steps after it hold at a time beside the weights
    (``torch.cuda.max_memory_allocated``). On the processor nothing tells a model's memory from that of others, so it is left out.
    """

    weights: int
    cache: NotRequired[dict[str, int]]
    prefill_peak: NotRequired[dict[str, int]]
    decode_peak: NotRequired[dict[str, int]]


class Pace(TypedDict):
    """Tokens a second at one batch size by model, and ``speedup`` of the pruned one, each ``median``, ``low`` and ``high``."""

    prefill: dict[str, dict[str, float]]
    decode: NotRequired[dict[str, dict[str, float]]]
    rounds: int


class Generation(TypedDict):
    """Reading ``prompt`` tokens a sample, and ``tokens`` steps after it of one token a sample each.

    ``why``: what cannot be measured here, and why.
    """

    prompt: int
    tokens: int
    batches: dict[str, Pace]
    memory: dict[str, Memory]
    why: NotRequired[str]


@dataclass
class _Tried:
    """What one run of a model, before any is timed, came to."""

    seconds: float
    cache: int = 0
    peaks: dict[str, int] = field(default_factory=dict)


def how() -> str:
    """How it is timed, in words."""
    return (
        "prefill: one pass over the prompt that fills the cache and answers for its last token; decoding: greedy, one token a "
        "pass with the cache; the models take turns"
    )


def generation(models: Mapping[str, nn.Module], text: Tensor, prompt: int, tokens: int, batches: Iterable[int]) -> Generation:
    """Times models beside each other, in turns as ``timed`` does; a model's cached answer is first compared with its own without.

    Args:
        models: called with ``input_ids`` and, for decoding, a cache (``CACHES``) and ``use_cache``, as transformers' are; others
            with tokens alone, for prefill.
        text: tokens for the prompts ``(tokens,)``, used again from their beginning where they end.
        prompt, tokens: see ``fitted``.
    """
    found: Generation = {"prompt": prompt, "tokens": tokens, "batches": {}, "memory": {}}
    found["memory"] = {name: {"weights": in_memory(model)} for name, model in models.items()}
    lacking = [why for model in models.values() if (why := _no_cache(model)) is not None]
    whys = [f"decoding is left out: {why}" for why in lacking[:1]]
    for size in batches:
        given = _prompts(text, size, prompt)
        for steps in (0,) if lacking else (tokens, 0):
            try:
                found["batches"][str(size)] = _pace(models, given, steps, found["memory"])
                break
            except _Other as error:
                whys.append(f"decoding at batch {size} is left out: {error}")
            except Exception as error:  # out of memory, or what a model of the user's does with tokens alone
                whys.append(f"batch {size} is left out: {quoted(error)}")
                break
    if whys:
        found["why"] = "; ".join(whys)
    return found


def fitted(prompt: int, tokens: int, places: int | None) -> tuple[int, int]:
    """``prompt`` and ``tokens``, fewer where a model has only ``places`` positions, of which ``tokens`` then take a quarter."""
    if places is None or prompt + tokens <= places:
        return prompt, tokens
    tokens = min(tokens, max(1, places // 4))
    return max(1, min(prompt, places - tokens)), tokens


def places(model: nn.Module) -> int | None:
    """The positions that a model's config knows, None where it says nothing."""
    config = getattr(model, "config", None)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(config, key, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


class _Other(Exception):
    """A model answers otherwise with its cache than without."""


def _pace(models: Mapping[str, nn.Module], given: Tensor, tokens: int, memory: Mapping[str, Memory]) -> Pace:
    size, prompt = given.shape
    prefill: dict[int, list[float]] = {id(model): [] for model in models.values()}
    with torch.no_grad(), ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
            stack.enter_context(traceless(model))
            stack.enter_context(_in_order(model))
        tried = {name: _tried(model, given.to(device_of(model)), tokens) for name, model in models.items()}
        _keep(memory, tried, str(size), tokens)
        most = max(1, min(MOST, int(ROUNDS / max(1e-9, sum(each.seconds for each in tried.values())))))

        def watch(model: nn.Module, inputs: Any) -> float:
            took = _timed_run(model, inputs, tokens)
            prefill[id(model)].append(took[0])
            return took[1] if tokens else took[0]

        steps = timed(models, given, SECONDS, most, watch, warm_up=min(1, WARM_UP))
    count = len(next(iter(steps.rounds.values())))
    reading = Timing({name: prefill[id(model)][-count:] for name, model in models.items()})
    pace: Pace = {"prefill": _rates(reading, size * prompt), "rounds": count}
    if tokens:
        pace["decode"] = _rates(steps, size * tokens)
    return pace


@contextmanager
def _in_order(model: nn.Module) -> Iterator[None]:
    """While inside, layers with keys and values have numbers without gaps, as an exported model's have: a cache asks the first

    one how long it is, which may have been removed.
    """
    numbered = [module for module in model.modules() if type(vars(module).get("layer_idx")) is int]
    before: list[int] = [vars(module)["layer_idx"] for module in numbered]
    order = {old: new for new, old in enumerate(sorted(set(before)))}
    for module, old in zip(numbered, before, strict=True):
        vars(module)["layer_idx"] = order[old]
    try:
        yield
    finally:
        for module, old in zip(numbered, before, strict=True):
            vars(module)["layer_idx"] = old


def _rates(timing: Timing, tokens: int) -> dict[str, dict[str, float]]:
    """Tokens a second of each model, and how many times as fast the pruned one is where there is one."""
    found = {}
    for name in timing.rounds:
        ms = timing.ms(name)
        found[name] = Interval(*(1e3 * tokens / each for each in (ms.median, ms.high, ms.low))).told()
    if "pruned" in timing.rounds:
        found["speedup"] = timing.speedup("pruned").told()
    return found


def _keep(memory: Mapping[str, Memory], tried: Mapping[str, _Tried], size: str, tokens: int) -> None:
    for name, each in tried.items():
        if tokens:
            memory[name].setdefault("cache", {})[size] = each.cache
        if "prefill" in each.peaks:
            memory[name].setdefault("prefill_peak", {})[size] = each.peaks["prefill"]
        if tokens and "decode" in each.peaks:
            memory[name].setdefault("decode_peak", {})[size] = each.peaks["decode"]


def _tried(model: nn.Module, given: Tensor, tokens: int) -> _Tried:
    """One run, its memory, and whether the cache changes the answer.

    Raises:
        _Other: it does, or the model cannot go on with it.
    """
    device = given.device
    _waited(device)
    begun, before = time.perf_counter(), _reset(device)
    answer = called(model, _arguments(model, given, cached=bool(tokens)))
    peaks = _peak(device, "prefill", before)
    if not tokens:
        return _Tried(time.perf_counter() - begun, 0, peaks)
    cache = _cache(answer)
    if cache is None:
        raise _Other(f"{type(model).__name__} answers without a cache")
    _reset(device)
    try:
        written = list(_written(model, answer, tokens))
    except Exception as error:  # any of a model's own
        raise _Other(f"{type(model).__name__} fails with its cache: {quoted(error)}") from error
    peaks |= _peak(device, "decode", before)
    _waited(device)
    seconds = time.perf_counter() - begun
    whole = torch.cat([given, *(token for token, _ in written)], 1)
    last = _last(called(model, _arguments(model, whole, cached=False)))
    with_cache = _last(written[-1][1])
    most = float(last.abs().max())
    apart = float((with_cache - last).abs().max())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if not apart <= (SAME_HALF if half else SAME) * most:
        raise _Other(
            f"{type(model).__name__} answers otherwise with its cache: logits of token {whole.shape[1]} are {apart:.2g} apart, "
            f"of {most:.2g} at most"
        )
    return _Tried(seconds, _bytes(cache), peaks)


def _timed_run(model: nn.Module, given: Tensor, tokens: int) -> tuple[float, float]:
    """Milliseconds of the prefill and of all steps."""
    device = given.device
    _waited(device)
    begun = time.perf_counter()
    answer = called(model, _arguments(model, given, cached=bool(tokens)))
    _waited(device)
    read = time.perf_counter()
    for _ in _written(model, answer, tokens):
        pass
    _waited(device)
    return 1e3 * (read - begun), 1e3 * (time.perf_counter() - read)


def _written(model: nn.Module, answer: Any, tokens: int) -> Iterator[tuple[Tensor, Any]]:
    """Step by step the token that was taken ``(samples, 1)``, and the answer after it."""
    name = _cache_name(model)
    for _ in range(tokens):
        token = answer.logits[:, -1].argmax(-1, keepdim=True)
        answer = called(model, {"input_ids": token, name: _cache(answer), "use_cache": True})
        yield token, answer


def _arguments(model: nn.Module, given: Tensor, cached: bool) -> Any:
    """What a model is called with; logits of the last token alone where it can be asked for them, as ``generate`` does."""
    taken = _taken(model)
    if "input_ids" not in taken:
        return given
    found: dict[str, Any] = {"input_ids": given}
    if "use_cache" in taken:
        found["use_cache"] = cached
    if "logits_to_keep" in taken:
        found["logits_to_keep"] = 1
    return found


def _no_cache(model: nn.Module) -> str | None:
    """Why a model has no cache to go on with; None where it has."""
    taken = _taken(model)
    missing = [name for name in ("input_ids", _cache_name(model) or CACHES[0], "use_cache") if name not in taken]
    return f"{type(model).__name__}.forward takes no {missing[0]}, so it has no cache" if missing else None


def _taken(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments that a model takes, as far as Python can tell."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def _cache_name(model: nn.Module) -> str:
    """The name under which a model takes its cache; empty where it takes none."""
    taken = _taken(model)
    return next((name for name in CACHES if name in taken), "")


def _cache(answer: Any) -> Any:
    """The cache in a model's answer; None where there is none."""
    return next((found for name in CACHES if (found := getattr(answer, name, None)) is not None), None)


def _last(answer: Any) -> Tensor:
    found: Tensor = answer.logits[:, -1].float()
    return found


def _prompts(text: Tensor, size: int, prompt: int) -> Tensor:
    """Prompts ``(size, prompt)`` of neighbouring tokens."""
    needed = size * prompt
    return text.repeat(-(-needed // len(text)))[:needed].view(size, prompt)


def _waited(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> int:
    """Bytes on the device before a run, whose peak is counted from now on."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, name: str, before: int) -> dict[str, int]:
    return {name: torch.cuda.max_memory_allocated(device) - before} if device.type == "cuda" else {}


def _bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache, each place in memory once."""
    stored: dict[int, int] = {}
    waiting, seen = [cache], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            if one.numel():
                stored[one.untyped_storage().data_ptr()] = one.numel() * one.element_size()
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif hasattr(one, "__dict__") and not isinstance(one, type | nn.Module) and id(one) not in seen:
            seen.add(id(one))
            waiting += vars(one).values()
    return sum(stored.values())
