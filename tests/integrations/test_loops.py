"""Recorded, masked and gone on with, in every library's loop: the same weights, exact masks, a whole path."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import OnlineInfluence, Planner, Trajectory, UsageError, make_plan, score
from prunekit.errors import ArtifactError, Note
from prunekit.integrations import Gradual, Recording
from prunekit.kernel import ModelFunction
from prunekit.kernel.reconstruction import reconstruct
from prunekit.trajectory.bare import named_tensors
from tests.integrations.loops import BATCH, COUNT, LOOPS, Samples, Tiny, check_first_gradient, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
Loop = Callable[..., nn.Module]


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed: pip install 'prunekit[hf,lightning]'")
    return LOOPS[request.param]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def a_plan(loop: Loop) -> Any:
    model: nn.Module = tiny()
    if loop is LOOPS["lightning"]:
        model = _Net(model)  # as it lies in the LightningModule
    return make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "clip": 0.3, "bf16": True}], ids=["plain", "accumulated, clipped, in bfloat16"]
)
def test_recording_changes_nothing_and_is_whole(tmp_path: Path, loop: Loop, options: dict[str, Any]) -> None:
    plain = weights(loop(tmp_path / "plain", None, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        model = loop(tmp_path / "recorded", Recording(tmp_path / "t", second_moments=True), **options)
    assert same(weights(model), plain)
    path = Trajectory(tmp_path / "t")
    each = math.ceil(COUNT / BATCH / options.get("accumulate", 1))
    assert path.complete
    assert len(path) == 2 * each
    last = path.model_state()
    for name, tensor in model.state_dict().items():
        assert torch.equal(next(v for k, v in last.items() if k.removeprefix("net.") == name), tensor), name
    for epoch in range(2):  # every sample once an epoch, in batches as they were trained on
        seen = [list(b) for s in range(epoch * each, (epoch + 1) * each) for b in path.step(s).batches or ()]
        assert sorted(k for b in seen for k in b) == list(range(COUNT))
        assert all(len(b) == BATCH for b in seen)
    if options:
        assert any(path.step(s).gradient_scale < 1 for s in range(len(path)))


def test_first_update_is_of_the_noted_samples(tmp_path: Path, loop: Loop) -> None:
    """The gradient of the noted samples, accumulated and clipped as noted, is what Adam's buffers hold after the step."""
    options = {"accumulate": 2, "clip": 0.3, "epochs": 1}
    loop(tmp_path / "out", Recording(tmp_path / "t", second_moments=True), **options)
    check_first_gradient(Trajectory(tmp_path / "t"), tiny())


def test_masks_are_exact_at_every_step(tmp_path: Path, loop: Loop) -> None:
    plan, seen = a_plan(loop), []

    def watch(model: nn.Module, step: int) -> None:
        named = named_tensors(model)
        seen.append(all(not named[n.removeprefix("net.")].detach()[~m].any() for n, m in plan.masks().items()))

    model = loop(tmp_path / "out", Recording(tmp_path / "t", plan=plan), accumulate=2, bf16=True, watch=watch)
    watch(model, -1)
    assert len(seen) > 8
    assert all(seen)
    path = Trajectory(tmp_path / "t")
    for index in range(len(path) + 1):
        state = path.layout.views(path.state(index))
        assert all(not state[name][~mask].any() for name, mask in plan.masks().items())


def test_path_is_complete(tmp_path: Path, loop: Loop) -> None:
    """f(θ_0) + Σ of all steps = f(θ_N), with a mask held."""
    model = loop(tmp_path / "out", Recording(tmp_path / "t", plan=a_plan(loop)), accumulate=2, clip=0.3, bf16=True)
    path = Trajectory(tmp_path / "t")
    x, trained, end = Samples().x[:5], tiny().eval(), tiny().eval()
    trained.load_state_dict(model.state_dict())  # in float32: the libraries leave their autocast in the model they trained
    end.load_state_dict({k.removeprefix("net."): v for k, v in path.model_state(-1).items()})
    assert torch.equal(end(x), trained(x))
    inside = _Net(tiny()) if loop is LOOPS["lightning"] else tiny()
    function = ModelFunction(inside, path.layout, path.fixed, "outputs", torch.device("cpu"))
    found = reconstruct(function, path.segments(), x, Samples().y[:5])
    assert float(found.error.max()) < 1e-3
    torch.testing.assert_close(found.model.float(), trained(x), rtol=1e-4, atol=1e-5)


class _Net(nn.Module):
    """The classifier under the name that it has in the LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)


def test_goes_on_from_a_checkpoint(tmp_path: Path, loop: Loop) -> None:
    """Trained on from the middle, the recording is that of a training in one go: later steps are dropped, to be taken again."""
    how = {"shuffle": False, "accumulate": 2, "clip": 0.3, "bf16": True}
    whole = weights(loop(tmp_path / "whole", Recording(tmp_path / "w", second_moments=True), **how))
    loop(tmp_path / "out", Recording(tmp_path / "t", second_moments=True), **how)
    names = {"transformers": "checkpoint-6", "lightning": "epoch=0.ckpt", "accelerate": "epoch-1"}
    resume = str(tmp_path / "out" / next(names[name] for name in LOOPS if LOOPS[name] is loop))
    again = loop(tmp_path / "out", Recording(tmp_path / "t", second_moments=True), resume=resume, **how)
    assert same(weights(again), whole)
    one, two = Trajectory(tmp_path / "t"), Trajectory(tmp_path / "w")
    assert one.complete
    assert one.hash == two.hash
    assert [one.step(s) for s in range(len(one))] == [two.step(s) for s in range(len(two))]
    one.verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_a_path_up_to_its_last_step(tmp_path: Path, loop: Loop, error: type[BaseException]) -> None:
    reached = []

    def watch(model: nn.Module, step: int) -> None:
        reached.append(weights(model))
        if len(reached) == 5:
            raise error("stop")

    recording = Recording(tmp_path / "t")
    with pytest.raises((error, SystemExit)):
        loop(tmp_path / "out", recording, watch=watch)
    recording.end(error("stop"))  # Trainer tells no callback; harmless in the others
    path = Trajectory(tmp_path / "t")
    assert not path.complete
    assert len(path) == 5
    state = path.layout.views(path.state(-1))
    assert all(torch.equal(tensor, reached[-1][name.removeprefix("net.")]) for name, tensor in state.items())


def test_prunes_while_training(tmp_path: Path, loop: Loop) -> None:
    model: nn.Module = _Net(tiny()) if loop is LOOPS["lightning"] else tiny()
    planner = Planner.of(Trajectory.of(model), model, criterion="magnitude")
    recording = Recording(tmp_path / "t", plan=Gradual(planner, 0.6, rounds=3))
    trained = loop(tmp_path / "out", recording)
    assert recording.plan is not None
    assert recording.plan.sparsity()["prunable"] == pytest.approx(0.6, abs=0.01)
    named = named_tensors(trained)
    assert all(not named[n.removeprefix("net.")].detach()[~m].any() for n, m in recording.plan.masks().items())
    path = Trajectory(tmp_path / "t")
    assert sum(not path.step(s).moved for s in range(len(path))) == 3  # three straight pieces
    assert torch.equal(
        path.layout.views(path.state(-1))["net.first.weight" if isinstance(model, _Net) else "first.weight"],
        named["first.weight"].detach(),
    )


def test_scores_online_and_keeps_every_third_state(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'prunekit[hf]'")
    data = Samples()

    def online(model: nn.Module, optimizer: torch.optim.Optimizer) -> OnlineInfluence:
        return OnlineInfluence(model, optimizer, data.x[:6], data.y[:6])

    recording = Recording(tmp_path / "t", every=3, online=online)
    model = LOOPS["accelerate"](tmp_path / "out", recording)
    assert recording.online is not None
    assert recording.online.scores().importance["first.weight"].shape == model.first.weight.shape
    assert Trajectory(tmp_path / "t").kept == {0, 3, 6, 9, 12, 14}


def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    planner = Planner.of(Trajectory.of(model), model, criterion="magnitude")
    with pytest.raises(UsageError, match="nothing to do"):
        Recording()
    with pytest.raises(UsageError, match="parent"):
        Recording(plan=Gradual(planner, 0.5), parent=Trajectory.of(model))
    gradual = Recording(plan=Gradual(planner, 0.5, rounds=4))
    with pytest.raises(UsageError, match="several processes"):
        gradual.begin(model, optimizer, steps=20, processes=2)
    with pytest.raises(UsageError, match="from a checkpoint"):
        gradual.begin(model, optimizer, steps=20, taken=3)
    with pytest.raises(UsageError, match="would end at step 4"):
        gradual.begin(model, optimizer, steps=2)
    assert not gradual.running

    recording = Recording(tmp_path / "t")
    recording.begin(model, optimizer)
    recording.end()
    with pytest.raises(ArtifactError, match="already holds"):
        Recording(tmp_path / "t").begin(model, optimizer)
    with torch.no_grad():
        model.first.weight.add_(1)
    with pytest.raises(ArtifactError, match="no recorded state up to step 1"):
        Recording(tmp_path / "t").begin(model, optimizer, taken=1)
    recording = Recording(tmp_path / "u")
    with pytest.warns(Note, match="which samples a step sees is not noted"):
        recording.begin(model, optimizer, loader=[1, 2])
    recording.end()


def test_steps_that_a_gradscaler_skips_are_no_steps(tmp_path: Path) -> None:
    """Scaled losses, one of them infinite, clipped without a word: the noted factor is that of clipping alone."""
    model, data = tiny(), Samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recording, expected = Recording(tmp_path / "t"), []
    recording.begin(model, optimizer, scale=scaler.get_scale)
    for step in range(4):
        optimizer.zero_grad()
        samples = list(range(4 * step, 4 * step + 4))
        recording.batch(samples)
        loss = F.cross_entropy(model(data.x[samples]), data.y[samples])
        scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            expected.append(min(1.0, 0.2 / (float(norm) + 1e-6)))
    recording.end()
    path = Trajectory(tmp_path / "t")
    assert [path.step(s).batches for s in range(len(path))] == [((0, 1, 2, 3),), ((8, 9, 10, 11),), ((12, 13, 14, 15),)]
    assert min(expected) < 1
    assert [path.step(s).gradient_scale for s in range(len(path))] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "extra"), [("transformers", "hf"), ("accelerate", "hf"), ("lightning", "lightning")])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    monkeypatch.delitem(sys.modules, f"prunekit.integrations.{name}", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without(name), *sys.meta_path])
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UsageError, match=rf"needs {name}, which is not installed; pip install 'prunekit\[{extra}\]'"):
        importlib.import_module(f"prunekit.integrations.{name}")


class _Without:
    """Finds nothing of one library."""

    def __init__(self, library: str) -> None:
        self.library = library

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(("accumulate", "told"), [(1, 0), (2, 1)])
def test_a_loss_that_divides_by_all_labels_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, told: int
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(Tiny, "accepts_loss_kwargs", True, raising=False)
    forward = Tiny.forward
    monkeypatch.setattr(Tiny, "forward", lambda self, x, labels=None, num_items_in_batch=None: forward(self, x, labels))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        LOOPS["transformers"](tmp_path / "out", Recording(tmp_path / "t"), accumulate=accumulate, epochs=1)
    assert sum("noted as equal parts" in str(one.message) for one in seen) == told
