"""A small language model and texts for it, which masks are learnt of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit.data import Samples
from prunekit.task import get_task
from tests.writer import Writer


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Writer(50, hidden=24).eval()


@pytest.fixture(scope="module")
def texts() -> Samples:
    tokens = torch.randint(50, (40, 12), generator=torch.Generator().manual_seed(1))
    return Samples.of([(tokens, tokens)], get_task("causal_lm").batch)
