"""A row of blocks passed forwards and backwards: scores are those of the model as a whole, and what is no such row is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import PrunekitError, Trajectory, UsageError
from prunekit.batch import Batch
from prunekit.blocks import Row, Viewed, held
from prunekit.criteria import Evidence, Scores, gather, score_evidence
from tests.blocks.models import Blocks
from tests.transformer_models import built

WHOLE = ("magnitude", "lamp", "random", "gradient", "snip", "wanda", "flap", "obs")
BY_SAMPLES = ("taylor", "taylor(aggregation=l1)", "fisher")


def evidence(model: nn.Module, batches: list[Batch], **options: Any) -> Evidence:
    return gather(Trajectory.of(model), model, batches, **options)


def spread(found: Evidence, folder: Path, most: int = 2**20) -> Evidence:
    names = tuple(entry.name for entry in found.layout.parameters)
    model = found.model.eval()
    return replace(found, spread=Row(model, names, found.samples(), found.task, Viewed(torch.device("cpu")), most, folder))


def language(family: str, **config: Any) -> Evidence:
    model, _ = built(family, **config)
    ids = torch.randint(3, 40, (7, 6), generator=torch.Generator().manual_seed(0))
    batches = [({"input_ids": part}, part) for part in ids.split((4, 3))]
    return evidence(model.double().eval(), batches, task="causal_lm")


def fitted(loss: Callable[..., Tensor] | None = None, **options: Any) -> Evidence:
    torch.manual_seed(0)
    model = Blocks(**options).double()
    batches = [(torch.randn(n, 5, 4).double(), torch.randn(n, 5, 2).double()) for n in (4, 3)]
    return evidence(model, batches, task="regression", loss=loss)


def mixing(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss of one's own, of a batch as a whole."""
    return (outputs - labels).square().mean().sqrt()


def own(evidence: Evidence) -> dict[str, Tensor]:
    """A criterion of one's own."""
    return dict(evidence.weights())


def near(one: Scores, other: Scores) -> None:
    assert (list(one.importance), list(one.axis_sums)) == (list(other.importance), list(other.axis_sums))
    assert one.provenance == other.provenance
    for name, expected in {**other.importance, **other.axis_sums}.items():
        found = {**one.importance, **one.axis_sums}[name]
        assert found.dtype == expected.dtype
        most = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * most, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: language("gpt2"), lambda: language("llama"), fitted])
def test_scores_are_those_of_the_whole_model(make: Callable[[], Evidence], tmp_path: Path) -> None:
    whole = make()
    parts = spread(whole, tmp_path, most=2**10)  # most of what is passed on lies in files
    for name in WHOLE:
        assert score_evidence(parts, name).digest == score_evidence(whole, name).digest, name
    for name in BY_SAMPLES:
        near(score_evidence(parts, name), score_evidence(whole, name))
    assert not list(tmp_path.iterdir())
    assert not any("forward" in vars(module) for module in whole.model.modules())


@pytest.mark.parametrize("loss", [None, mixing])
def test_batches_that_take_much_room_are_cut_unless_their_loss_mixes_them(
    loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "ROWS", 10)  # two samples
    whole = fitted(loss)
    parts = spread(whole, tmp_path)
    assert parts.spread is not None
    assert [len(group) for group in parts.spread.cut(whole.samples()).groups] == [2, 2, 2, 1]
    for name in ("gradient", "snip", "wanda", "flap"):
        near(score_evidence(parts, name), score_evidence(whole, name))


def test_a_model_that_mixes_its_batch_keeps_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Centred(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) / 2)

    monkeypatch.setattr(held, "ROWS", 10)
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, 4).double(), torch.randn(6, 5, 2).double()
    whole = evidence(Centred().double(), [(x, y)], task="regression")
    for name in ("gradient", "wanda"):
        assert score_evidence(spread(whole, tmp_path), name).digest == score_evidence(whole, name).digest
    with pytest.raises(UsageError, match="no sample can be scored alone"):
        score_evidence(spread(whole, tmp_path), "taylor")


@pytest.mark.slow
def test_units_are_scored_too(tmp_path: Path) -> None:
    model, _ = built("mixtral")
    ids = torch.randint(3, 40, (5, 6), generator=torch.Generator().manual_seed(0))
    whole = evidence(model.eval(), [({"input_ids": ids}, ids)], task="causal_lm", ignore=["*embed*", "lm_head*"])
    for name in ("reap", "block_influence"):
        found = score_evidence(spread(whole, tmp_path), name)
        assert any(bool(sums.any()) for sums in found.axis_sums.values())
        assert found.digest == score_evidence(whole, name).digest


def test_a_parameter_that_nothing_depends_on_has_no_gradient(tmp_path: Path) -> None:
    class Idle(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.blocks[1].idle = nn.Linear(3, 3), nn.Linear(3, 3)  # type: ignore[union-attr]

    torch.manual_seed(0)
    whole = evidence(Idle().double(), [(torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double())], task="regression")
    for name in ("gradient", "fisher"):
        found = score_evidence(spread(whole, tmp_path), name)
        near(found, score_evidence(whole, name))
        assert not found.importance["blocks.1.idle.weight"].any()
        assert not found.importance["idle.weight"].any()


class Skips(Blocks):
    """What comes behind the blocks looks at what one of them gave."""

    def forward(self, x: Tensor) -> Tensor:
        h, kept = self.first(x), []
        for block in self.blocks:
            h = block(h, scale=torch.tensor(0.5).double())[0]
            kept.append(h)
        found: Tensor = self.head(kept[0] + kept[-1])
        return found


class Learns(Blocks):
    """Blocks are called with a parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = block(h, scale=self.scale)[0]
        found: Tensor = self.head(h)
        return found


def shared_weights() -> nn.Module:
    model = Blocks()
    model.blocks[2].inner.weight = model.blocks[0].inner.weight  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Skips, "what comes behind the blocks of blocks looks at more than the last one's outputs"),
        (Learns, "called with more than hidden states that was computed from weights"),
        (lambda: Blocks(between=torch.relu), r"no one row of blocks .*what an item gives is not what the next one gets"),
        (shared_weights, "blocks.0.inner.weight is shared by several blocks"),
        (lambda: nn.Sequential(nn.Linear(4, 2)), "Sequential is no one row of blocks .*it has no list of blocks"),
        (lambda: nn.utils.parametrizations.weight_norm(Blocks().head) and _normed(), "computed from other parameters"),
    ],
)
def test_what_is_no_row_of_blocks_is_refused(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().double()
    found = evidence(model, [(torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double())], task="regression")
    with pytest.raises(UsageError, match=message):
        score_evidence(spread(found, tmp_path), "gradient")


def _normed() -> nn.Module:
    model = Blocks()
    nn.utils.parametrizations.weight_norm(model.head)
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("influence", "influence needs a training path"),
        ("grasp", "grasp looks at the whole model at once"),
        ("tests.blocks.test_row:own", "goes with magnitude, gradient, taylor"),
        ("taylor(target=log_prob)", "leave target=log_prob out"),
    ],
)
def test_criteria_that_need_the_whole_model_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PrunekitError, match=message):
        score_evidence(spread(fitted(), tmp_path), name)


def test_single_samples_of_a_loss_of_ones_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mixing is your own"):
        score_evidence(spread(fitted(mixing), tmp_path), "fisher")


class Remembers(Blocks):
    """A language model's cache, which would grow each time that a block runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.config.use_cache
        return super().forward(x)


@pytest.mark.parametrize("name", ["gradient", "taylor", "wanda"])
def test_no_cache_is_kept(name: str, tmp_path: Path) -> None:
    whole, model = fitted(), Remembers().double()
    model.load_state_dict(whole.model.state_dict())
    near(score_evidence(spread(replace(whole, model=model), tmp_path), name), score_evidence(whole, name))
    assert model.config.use_cache


class Away(Viewed):
    """Weights that are NaN but for those whose turn it is; ``most`` is how many numbers were there at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(torch.device("cpu"))
        tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
        self.real = {id(tensor): tensor.data for tensor in tensors}
        self.there, self.most = 0, 0
        for tensor in tensors:
            tensor.data = torch.full_like(tensor.data, torch.nan)

    @contextmanager
    def here(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        mine = [(tensor, tensor.data) for tensor in tensors if id(tensor) in self.real and bool(tensor.data.isnan().all())]
        size = sum(data.numel() for _, data in mine)
        for tensor, _ in mine:
            tensor.data = self.real[id(tensor)]
        self.there += size
        self.most = max(self.most, self.there)
        try:
            yield
        finally:
            self.there -= size
            for tensor, data in mine:
                tensor.data = data


@pytest.mark.parametrize("name", ["gradient", "taylor", "wanda"])
def test_one_block_is_there_at_a_time(name: str, tmp_path: Path) -> None:
    whole = fitted(blocks=5)
    expected = score_evidence(whole, name)
    model = Blocks(blocks=5).double()
    model.load_state_dict(whole.model.state_dict())
    parts = spread(replace(whole, model=model), tmp_path)
    home = Away(model.eval())
    found = score_evidence(
        replace(parts, spread=Row(model, parts.spread._names, whole.samples(), whole.task, home, 2**20, tmp_path)), name
    )  # type: ignore[union-attr]
    near(found, expected)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    around = sum(parameter.numel() for layer in (model.first, model.head) for parameter in layer.parameters())
    assert home.most == block + around
