"""transformers' ``Trainer``: a callback that records its path and holds masks."""

from __future__ import annotations

import inspect
import math
from typing import Any

from prunekit.imports import lacking
from prunekit.integrations.recording import Recording
from prunekit.trajectory.bare import bare

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise lacking(error) or error from None


class RecordingCallback(TrainerCallback):
    """Does in a ``Trainer`` what ``recording`` says.

    After ``resume_from_checkpoint`` the recording goes on where the checkpoint was saved. ``Trainer`` tells no callback of an
    error: a recording that was cut off is closed when the next training begins, when Python ends, or by
    ``recording.end(error)``.

    Example:
        >>> from transformers import Trainer, TrainingArguments  # doctest: +SKIP
        >>> from prunekit.integrations import Recording
        >>> from prunekit.integrations.transformers import RecordingCallback
        >>> callback = RecordingCallback(Recording("runs/a/trajectory"))
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._batch = 0  # number in its epoch of the micro-batch that comes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        optimizer, loader = kwargs["optimizer"], kwargs["train_dataloader"]
        scaler = getattr(optimizer, "scaler", None)
        self._skip = 0
        if state.global_step and not args.ignore_data_skip:
            steps = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
            self._skip = state.global_step % steps * args.gradient_accumulation_steps
        self.recording.begin(
            kwargs["model"],
            optimizer,
            loader=loader,
            taken=state.global_step,
            steps=state.max_steps,
            processes=args.world_size,
            main=state.is_world_process_zero,
            scale=lambda: 1.0 if scaler is None else scaler.get_scale(),
            clips=args.max_grad_norm > 0,
        )
        if args.gradient_accumulation_steps > 1 and _weighs_labels(bare(kwargs["model"])):
            self.recording.parts_unknown("this model's loss divides by the labels of all of them")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batch, self._skip = self._skip, 0
        self.recording.listen()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._note()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._note()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recording.end()

    def _note(self) -> None:
        self.recording.numbered(self._batch)
        self._batch += 1


def _weighs_labels(model: Any) -> bool:
    """Whether ``Trainer`` gives the model ``num_items_in_batch``, by which its loss divides: transformers' own rule."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values())
