"""By which protocol a language model was measured, and what two models differ by on the same windows."""

from __future__ import annotations

import math
from typing import NotRequired, TypedDict

from torch import Tensor

from prunekit.batch import Inputs, leaves, named
from prunekit.data.samples import Samples
from prunekit.measure.measure import Measure, ratio
from prunekit.task.evaluation import Evaluation
from prunekit.task.places import CausalLM, LanguageModel, MaskedLM
from prunekit.task.task import Task

WITHIN = 1.96
"""Standard errors to either side of a figure, between which the true one lies with 95 % where errors are normal."""


class Protocol(TypedDict):
    """How perplexity and what else is a mean over tokens came about.

    A figure is a mean over ``tokens``, those of all windows together, so that a window with more of them counts more; perplexity
    is the exponential of the mean negative log-likelihood (natural logarithm) of a token.

    ``windows`` of ``split``, each of ``length`` tokens at most; neighbours begin ``stride`` tokens apart, where the data say it.
    ``asked``, in words, which tokens of a window are predicted; ``ignored`` counts the places that ask for none (padding, labels
    of ``ignore_index``, a window's end). ``bytes`` of text that ``tokens`` stand for, where that is known.
    """

    split: str
    windows: int
    length: int
    stride: NotRequired[int]
    tokens: int
    ignored: int
    ignore_index: int
    asked: str
    bytes: NotRequired[int]


class Difference(TypedDict):
    """What the pruned model's figure is above the dense one's, in the measure's unit (points of a share), and its error.

    A measure of closeness has the error of the figure itself. One window has no error.
    """

    difference: NotRequired[float]
    standard_error: NotRequired[float]


class Paired(TypedDict):
    """Differences by measure, on the same ``windows``, with the delete-one jackknife's standard errors over windows.

    ``nats_per_token`` is of the mean negative log-likelihood, the logarithm of perplexity; ``perplexity_ratio``, pruned over
    dense, is the exponential of its difference, with its interval of 95 %.
    """

    windows: int
    differences: dict[str, Difference]
    perplexity_ratio: dict[str, float]


def surprise(task: Task) -> Measure | None:
    """The measure whose rows are a sample's negative log-likelihood and its tokens; None of a task that has none."""
    if not isinstance(task, LanguageModel):
        return None
    return next((measure for measure in task.measures if measure.name == "perplexity"), None)


def protocol(task: LanguageModel, split: str, samples: Samples, found: Evaluation, stride: int | None) -> Protocol:
    """The protocol of an evaluation.

    Args:
        stride: of the windows, None where nobody says it.
    """
    length = places = 0
    for inputs, labels in samples:
        length, places = max(length, _length(inputs)), places + labels.numel()
    sums = found.rows["perplexity"]
    tokens = int(sums[:, 1].sum())
    told: Protocol = {
        "split": split,
        "windows": found.samples,
        "length": length,
        "tokens": tokens,
        "ignored": places - tokens,
        "ignore_index": task.ignore_index,
        "asked": _asked(task, int(sums[:, 1].max()), length, stride),
    }
    if stride is not None:
        told["stride"] = stride
    share = samples.bytes_per_token if samples.bytes_per_token is not None else task.bytes_per_token
    if share is not None:
        told["bytes"] = round(share * tokens)
    return told


def _asked(task: LanguageModel, most: int, length: int, stride: int | None) -> str:
    """Which tokens are predicted; ``most``: of one window."""
    if isinstance(task, MaskedLM):
        return "the masked tokens of a window"
    if not isinstance(task, CausalLM):
        return "the tokens of a sample's answer"
    if most == length:
        return "the token after each token of a window, its last one's too"
    if stride is not None and stride < length:
        return "every token once, by the first window in which one stands before it"
    return "every token of a window but its first, which has none before it"


def _length(inputs: Inputs) -> int:
    """Tokens of a window, padding included."""
    tokens = named(inputs).get("input_ids", leaves(inputs)[0])
    return int(tokens.shape[1])


def paired(pruned: Evaluation, dense: Evaluation) -> Paired:
    """What ``pruned`` differs by from ``dense`` of the same windows."""
    several = pruned.samples > 1
    differences: dict[str, Difference] = {}
    (perplexity,) = (measure for measure in pruned.measures if measure.name == "perplexity")
    nats = Measure("nats_per_token", perplexity.each, ratio, better="lower", unit="nats")
    for measure in (*pruned.measures, nats):
        name = "perplexity" if measure is nats else measure.name
        rows, of_dense = pruned.rows[name], dense.rows.get(name)
        differences[measure.name] = _difference(measure, rows, of_dense, several)
    told = differences["nats_per_token"]
    away = WITHIN * told.get("standard_error", 0.0)
    ends = {"ratio": 0.0, "low": -away, "high": away} if several else {"ratio": 0.0}
    return {
        "windows": pruned.samples,
        "differences": differences,
        "perplexity_ratio": {name: math.exp(told["difference"] + end) for name, end in ends.items()},
    }


def _difference(measure: Measure, rows: Tensor, dense: Tensor | None, several: bool) -> Difference:
    if dense is None:
        return {"standard_error": measure.error(rows)} if several else {}
    lost, error = measure.lost(rows, dense)
    found: Difference = {"difference": -measure.sign * lost + 0.0}
    if several:
        found["standard_error"] = error
    return found
