"""What eval and latency tell of a language model: protocol, paired differences, tokens a second and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.batch import Inputs, named
from prunekit.explain.evaluation import Generated, LanguageFigures
from prunekit.measure.generation import fitted, generation, places
from prunekit.task import CausalLM
from prunekit.task.evaluation import Evaluation
from prunekit.task.places import LanguageModel
from prunekit.task.protocol import paired, protocol, surprise
from prunekit.verbs.run_folder import Run

SPLIT = "test"
READ = 16
"""Windows whose tokens are prompts."""


def language_figures(run: Run, models: Mapping[str, nn.Module], dense: Evaluation, pruned: Evaluation) -> LanguageFigures | None:
    """Of a language model's evaluations on test data; None for any other model.

    Args:
        models: ``dense`` and ``pruned``.
    """
    if not isinstance(run.task, LanguageModel) or surprise(run.task) is None:
        return None
    found: LanguageFigures = {
        "protocol": protocol(run.task, SPLIT, run.batches(SPLIT), dense, run.splits[SPLIT].stride),
        "paired": paired(pruned, dense),
    }
    if (pace := generated(run, models)) is not None:
        found["generation"] = pace
    return found


def generated(run: Run, models: Mapping[str, nn.Module], batches: Sequence[int] = ()) -> Generated | None:
    """Tokens a second of models beside each other, as ``eval.generation`` of the recipe says; None where it is off, or for models

    that do not write: those of another task than causal_lm.

    Args:
        batches: sizes; the recipe's where there are none.
    """
    options = run.recipe.eval.generation
    if options is None or not isinstance(run.task, CausalLM):
        return None
    known = [found for model in models.values() if (found := places(model)) is not None]
    prompt, tokens = fitted(options.prompt, options.tokens, min(known, default=None))
    text = _tokens(run.batches(SPLIT).rows(0, READ)[0])
    pace = ranks.from_first(lambda: generation(models, text, prompt, tokens, batches or options.batches))
    return {**pace, "asked": [options.prompt, options.tokens]}


def _tokens(inputs: Inputs) -> Tensor:
    """The windows' tokens in a row, without padding."""
    every = named(inputs)
    tokens = every.get("input_ids", next(iter(every.values())))
    mask = every.get("attention_mask")
    counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None or mask.shape != tokens.shape else mask.bool()
    return tokens[counted]
