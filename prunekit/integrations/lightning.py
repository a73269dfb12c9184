"""Lightning's ``Trainer``: a callback that records its path and holds masks."""

from __future__ import annotations

from typing import Any

import torch

from prunekit.imports import lacking
from prunekit.integrations.recording import Recording

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise lacking(error) or error from None


class RecordingCallback(Callback):
    """Does in Lightning's ``Trainer.fit`` what ``recording`` says.

    After ``fit(…, ckpt_path=…)`` the recording goes on where the checkpoint was saved. Ctrl-C and errors cut it off after its
    last whole step.

    Example:
        >>> from lightning.pytorch import Trainer  # doctest: +SKIP
        >>> from prunekit.integrations import Recording
        >>> from prunekit.integrations.lightning import RecordingCallback
        >>> callback = RecordingCallback(Recording("runs/a/trajectory"))
        >>> Trainer(max_epochs=2, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self.recording.begin(
            pl_module,
            trainer.optimizers,
            loader=trainer.train_dataloader,
            taken=trainer.global_step,
            steps=int(steps) if steps not in (float("inf"), -1) else None,
            processes=trainer.world_size,
            main=trainer.is_global_zero,
        )
        own = type(pl_module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
        if own or (trainer.gradient_clip_val and not _by_norm(trainer)):
            self.recording.clipping_unknown("the module clips by itself" if own else "clipping by value has no one factor")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recording.listen()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        automatic = pl_module.automatic_optimization
        self.recording.numbered(batch_idx, 1 / trainer.accumulate_grad_batches if automatic else None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if trainer.gradient_clip_val and _by_norm(trainer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.recording.clipped(torch.nn.utils.get_total_norm(gradients), trainer.gradient_clip_val)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recording.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.recording.end(exception)


def _by_norm(trainer: Trainer) -> bool:
    return trainer.gradient_clip_algorithm is None or trainer.gradient_clip_algorithm == "norm"
