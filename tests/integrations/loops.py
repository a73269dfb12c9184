"""One small training in three libraries' loops: the same model, data and options, so that what is recorded can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from prunekit import Trajectory

COUNT, BATCH = 28, 4
LR, DECAY, CLIP = 0.05, 0.1, 0.3


class Tiny(nn.Module):
    """A classifier as transformers has it: called by keywords, it gives loss and logits; called by inputs, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.last(torch.tanh(self.norm(self.first(x))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(1))
        self.y = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def check_first_gradient(path: Trajectory, model: nn.Module) -> None:
    """The gradient of the noted samples, accumulated and clipped as noted, is what Adam's buffers hold after the first step.

    Args:
        model: as it was before that step.
    """
    data, step = Samples(), path.step(0)
    loss = torch.zeros(())
    for samples, weight in zip(step.batches or (), step.weights, strict=True):
        loss = loss + weight * F.cross_entropy(model(data.x[list(samples)]), data.y[list(samples)])
    loss.backward()
    moments, named = path.second_moments(0), dict(model.named_parameters())
    assert moments is not None
    for entry in path.layout.parameters:
        gradient = named[entry.name.removeprefix("net.")].grad
        assert gradient is not None
        expected = (step.gradient_scale * gradient).square() * 0.001  # Adam's v with beta 0.999
        torch.testing.assert_close(moments[entry.span].view_as(expected), expected, rtol=2e-3, atol=1e-12)


@dataclass(frozen=True)
class How:
    """What a loop is to do.

    ``watch(model, step)`` is called after every step; ``resume`` is where it goes on from; transformers' Trainer always shuffles.
    ``bf16`` computes in bfloat16 by autocast; ``processes`` train together.
    """

    accumulate: int = 1
    clip: float = 0.0
    epochs: int = 2
    resume: str | None = None
    watch: Any = None
    shuffle: bool = True
    bf16: bool = False
    processes: int = 1


def by_options(train: Callable[[Path, Any, How], nn.Module]) -> Callable[..., nn.Module]:
    """Called with what ``How`` has as keywords."""
    return lambda folder, recording, **options: train(folder, recording, How(**options))


@by_options
def with_trainer(folder: Path, recording: Any, how: How) -> nn.Module:
    """Trained by transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from prunekit.integrations.transformers import RecordingCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if how.watch is not None:
                how.watch(kwargs["model"], state.global_step)

    arguments = TrainingArguments(
        str(folder), num_train_epochs=how.epochs, per_device_train_batch_size=BATCH, gradient_accumulation_steps=how.accumulate,
        max_grad_norm=how.clip, learning_rate=LR, weight_decay=DECAY, use_cpu=True, bf16=how.bf16, report_to=[],
        save_strategy="steps", save_steps=3,
        lr_scheduler_type="linear", disable_tqdm=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    callbacks = [Watch()] if recording is None else [RecordingCallback(recording), Watch()]
    model = tiny()
    Trainer(model, arguments, train_dataset=Samples(), callbacks=callbacks).train(resume_from_checkpoint=how.resume)
    return model


@by_options
def with_lightning(folder: Path, recording: Any, how: How) -> nn.Module:
    """Trained by Lightning's Trainer, automatic optimization."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from prunekit.integrations.lightning import RecordingCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=DECAY)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if how.watch is not None:
                how.watch(module.net, trainer.global_step)

    torch.manual_seed(0)
    module = Module()
    torch.manual_seed(3)
    trainer = Trainer(
        max_epochs=how.epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        precision="bf16-mixed" if how.bf16 else "32-true", devices=how.processes, strategy="ddp" if how.processes > 1 else "auto",
        accumulate_grad_batches=how.accumulate, gradient_clip_val=how.clip or None, default_root_dir=str(folder),
        callbacks=[
            *([] if recording is None else [RecordingCallback(recording)]), Watch(),
            ModelCheckpoint(str(folder), "{epoch}", save_top_k=-1, every_n_epochs=1),
        ],
    )  # fmt: skip
    loader = DataLoader(Samples(), BATCH, shuffle=how.shuffle, generator=torch.Generator().manual_seed(5))
    trainer.fit(module, loader, ckpt_path=how.resume)
    return module.net


@by_options
def with_accelerate(folder: Path, recording: Any, how: How) -> nn.Module:
    """Trained by a loop of Accelerate's; ``folder/epoch-N`` are its checkpoints."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from prunekit.integrations.accelerate import Accelerated

    AcceleratorState._reset_state(reset_partial_state=False)  # an earlier loop of this process may have had another precision
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=how.accumulate, mixed_precision="bf16" if how.bf16 else "no")
    plain = tiny()
    first = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=DECAY)
    torch.manual_seed(3)
    given = DataLoader(Samples(), BATCH, shuffle=how.shuffle, generator=torch.Generator().manual_seed(5))
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.9**step)
    model, optimizer, loader, schedule = accelerator.prepare(plain, first, given, schedule)
    begin, steps = 0, 0
    if how.resume is not None:
        accelerator.load_state(how.resume)
        begin = int(how.resume.rpartition("-")[2])
        steps = begin * -(-len(loader) // how.accumulate)

    def epoch(batches: Any, clipping: Any) -> int:
        count = 0
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    if how.clip:
                        clipping(model.parameters(), how.clip)
                    count += 1
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if how.watch is not None:
                how.watch(plain, count)
        return count

    if recording is None:
        for _ in range(begin, how.epochs):
            epoch(loader, accelerator.clip_grad_norm_)
        return plain
    with Accelerated(
        recording, accelerator, model, optimizer, loader, taken=steps, steps=how.epochs * len(loader) // how.accumulate
    ) as loop:
        for number in range(begin, how.epochs):
            epoch(loop, loop.clip_grad_norm_)
            accelerator.save_state(str(folder / f"epoch-{number + 1}"))
    return plain


LOOPS = {"transformers": with_trainer, "lightning": with_lightning, "accelerate": with_accelerate}
