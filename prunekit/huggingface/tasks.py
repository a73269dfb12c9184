"""What a model is for, as its class and config say it: one row an ending of transformers' class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.errors import UsageError
from prunekit.huggingface.classes import model_class, read_config
from prunekit.huggingface.folder import Folder

PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label",
}
"""``problem_type`` of a config -> task."""
CLASSIFIERS = (
    "ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification",
    "ForNextSentencePrediction", "ForMultipleChoice",
)  # fmt: skip
ENDINGS = {
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSemanticSegmentation": "segmentation",
}
"""End of a class's name -> task, whatever its config says."""
HEADS = {"ForQuestionAnswering": ("start_logits", "end_logits")}
"""Of classes with several answers that count, which need a loss of the user's: the answers' names."""


def task_of(path: Path, auto: str | None = None, labelled: bool = True) -> str | None:
    """The name of the task that the folder's model is for; None where its data must say it (a base model, for one).

    Args:
        labelled: whether there are data, for which a task must be found.

    Raises:
        UsageError: there are data, and its answers need a task of heads, which the user must name with a loss.
        PrunekitError: the folder's config is not whole, or its class unknown.
    """
    folder = Folder(path)
    name, config = model_class(folder, auto).__name__, read_config(folder)
    if (heads := next((heads for end, heads in HEADS.items() if name.endswith(end)), None)) is not None:
        if not labelled:
            return None
        listed = ", ".join(f'"{head}"' for head in heads)
        raise UsageError(
            f"{path}: {name} answers with {' and '.join(heads)}; name the task and a loss of yours: "
            f'task {{"name": "heads", "heads": [{listed}]}}, loss my_module:loss'
        )
    if name.endswith(CLASSIFIERS):
        return _classifier(config, name)
    if name.endswith(("ForConditionalGeneration", "ForSpeechSeq2Seq")):
        return "seq2seq" if config.is_encoder_decoder else "causal_lm"
    return next((task for end, task in ENDINGS.items() if name.endswith(end)), None)


def _classifier(config: Any, name: str) -> str | None:
    """By ``problem_type``; without it one number means regression, and labels of several say whether one class is right."""
    if config.problem_type is not None:
        return PROBLEMS[config.problem_type]
    labelled = name.endswith(("ForSequenceClassification", "ForImageClassification"))
    return "regression" if labelled and config.num_labels == 1 else None
