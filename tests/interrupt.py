"""Ctrl-C at a moment of the test's choice: a real SIGINT while a model is called, wherever the call comes from."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def ctrl_c(kind: type[nn.Module], when: Callable[[nn.Module], bool], call: int = 1) -> Iterator[None]:
    """Interrupts the process at one of the calls of a model of ``kind`` for which ``when(model)`` holds, counted from 1."""
    calls = 0

    def interrupt(module: nn.Module, _: object) -> None:
        nonlocal calls
        if isinstance(module, kind) and when(module):
            calls += 1
            if calls == call:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    hook = register_module_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, before)
    assert calls >= call, f"the model was called {calls} times, and never interrupted"


def trains(model: nn.Module) -> bool:
    """Whether a call is a training step: it differentiates a model that is in training."""
    return torch.is_grad_enabled() and model.training


def repairs(model: nn.Module) -> bool:
    """Whether a call is one of refining: it differentiates a model that is not in training."""
    return torch.is_grad_enabled() and not model.training
