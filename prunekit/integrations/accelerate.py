"""Accelerate: a loop of one's own, made by ``Accelerator.prepare``, that records its path and holds masks."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from prunekit.errors import UsageError
from prunekit.imports import lacking
from prunekit.integrations.recording import Recording

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise lacking(error) or error from None


class Accelerated:
    """Does in a loop of Accelerate's what ``recording`` says.

    Args:
        accelerator: what prepared model, optimizer and loader.
        model, optimizer, loader: as ``prepare`` returned them; several optimizers as a list.
        taken: steps that ``accelerator.load_state`` has gone back to; the recording goes on from there.
        steps: optimizer steps of the whole training, for a ``Gradual``.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from prunekit import Trajectory
        >>> from prunekit.integrations import Recording
        >>> from prunekit.integrations.accelerate import Accelerated
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
        >>> model, optimizer, data = accelerator.prepare(model, optimizer, data)
        >>> recording = Recording(getfixture("tmp_path") / "trajectory")
        >>> with Accelerated(recording, accelerator, model, optimizer, data) as loop:
        ...     for x in loop:
        ...         optimizer.zero_grad()
        ...         accelerator.backward(model(x).square().mean())
        ...         loop.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        tensor(...)
        tensor(...)
        >>> Trajectory(getfixture("tmp_path") / "trajectory").step(1).batches
        ((4, 5, 6, 7),)
    """

    def __init__(
        self,
        recording: Recording,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        loader: Any,
        *,
        taken: int = 0,
        steps: int | None = None,
    ) -> None:
        self.recording, self.accelerator, self.loader = recording, accelerator, loader
        self._given = (model, optimizer, taken, steps)

    def __enter__(self) -> Accelerated:
        model, optimizer, taken, steps = self._given
        self.recording.begin(
            model,
            optimizer,
            loader=self.loader,
            taken=taken,
            steps=steps,
            processes=self.accelerator.num_processes,
            main=self.accelerator.is_main_process,
            scale=lambda: 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale(),
            clips=self.accelerator.num_processes == 1,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.recording.end(error)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """The loader's batches, one epoch."""
        return self.batches()

    def batches(self, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch from number ``skip`` on, as ``accelerator.skip_first_batches`` gives them."""
        if not self.recording.running:
            raise UsageError("Accelerated gives batches inside its with block only: with Accelerated(...) as loop")
        self.recording.listen()
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        for number, batch in enumerate(loader, start=skip):
            self.recording.numbered(number, 1 / self.accelerator.gradient_accumulation_steps)
            yield batch

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor | None:
        """``accelerator.clip_grad_norm_``, whose factor is noted for the coming step."""
        norm: Tensor | None = self.accelerator.clip_grad_norm_(parameters, max_norm, norm_type)
        if norm is not None and self.accelerator.sync_gradients:
            self.recording.clipped(norm, max_norm)
        return norm
