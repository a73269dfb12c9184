"""The experiments' own arithmetic, on small models: sums by component, layers of two times, orders of steps, the document."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.reproduction import grokking, pruning, steps
from benchmarks.reproduction.common import COMPONENTS, DOCUMENT, log_probabilities, write_section
from prunekit.criteria import score
from prunekit.data import modadd
from prunekit.kernel import ModelFunction, attribute
from prunekit.models import modadd_transformer
from prunekit.trajectory import Recorder, Trajectory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Trajectory]:
    """A transformer of modulus 5 in float64, 6 steps of AdamW."""
    torch.manual_seed(0)
    model = modadd_transformer(5, 8, 2, 12).double()
    x, y = modadd(5, 8, 3, 2)["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1.0)
    folder = tmp_path_factory.mktemp("small") / "path"
    with Recorder(folder, model, optimizer):
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, Trajectory(folder)


def test_components_are_all_of_the_model_once() -> None:
    named = [name for members in COMPONENTS.values() for name in members]
    assert sorted(named) == sorted(name for name, _ in modadd_transformer().named_parameters())


def test_windows_add_up_what_the_kernel_attributes(small: tuple[nn.Module, Trajectory], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grokking, "CHUNK", 2)
    model, path = small
    function = ModelFunction(model, path.layout, target=log_probabilities)
    x, y = modadd(5, 8, 3, 2)["validation"]
    windows = list(grokking.contributions(function, path.segments(), x, y, 4))
    assert [begin for begin, _, _ in windows] == [0, 4]
    for begin, kernel, decay in windows:
        for found, share in ((kernel, "kernel"), (decay, "regularisation")):
            (whole,) = attribute(function, lambda: path.segments(begin=begin, end=begin + 4), x, y, share=share)  # noqa: B023
            for component, members in COMPONENTS.items():
                expected = sum(float(whole.scores[name].abs().sum()) for name in members)
                assert found[component] == pytest.approx(expected, rel=1e-6), (begin, share, component)


def test_swapped_layers_come_from_the_other_state_and_nothing_else_does(small: tuple[nn.Module, Trajectory]) -> None:
    model, path = small
    function = ModelFunction(model, path.layout)
    early, late = path.state(1), path.state(-1)
    mixed = path.layout.views(grokking.with_layers(function, early, late, ("embedding", "MLP out")))
    for name, tensor in mixed.items():
        outer = name.startswith(("embedding", "down"))
        assert tensor.equal(path.layout.views(late if outer else early)[name]), name
    assert early.equal(path.state(1))


@pytest.mark.parametrize("pooled", [False, True])
def test_the_classifier_stays_whole_and_the_threshold_runs_over_its_pool(pooled: bool) -> None:
    torch.manual_seed(0)
    importance = {"a.weight": torch.rand(30, 10), "classifier.weight": 2 * torch.rand(10, 10)}
    masks = pruning.masks_of(importance, 0.2, pooled)
    assert masks.keys() == {"a.weight"}
    pool = torch.cat([v.flatten() for name, v in importance.items() if pooled or name == "a.weight"])
    threshold = pool.sort(descending=True).values[round(0.2 * len(pool)) - 1]
    assert masks["a.weight"].equal(importance["a.weight"] >= threshold)


def test_order_inside_layers_and_shares_between_them_can_come_from_two_scores() -> None:
    torch.manual_seed(0)
    first = {"a": torch.rand(40, 5), "b": 3 * torch.rand(20, 5)}
    second = {"a": torch.rand(40, 5), "b": torch.rand(20, 5)}
    both = pruning.ranked_masks(first, second, 0.3)
    alone = pruning.ranked_masks(second, second, 0.3)
    for name in first:
        count = int(alone[name].sum())
        assert int(both[name].sum()) == count
        assert set(both[name].flatten().nonzero().flatten().tolist()) == set(first[name].flatten().topk(count).indices.tolist())
    assert sum(int(mask.sum()) for mask in alone.values()) == 90


@pytest.mark.parametrize("rounds", [1, 4])
def test_rescoring_ends_at_the_asked_share_and_in_one_round_is_plain_taylor(
    small: tuple[nn.Module, Trajectory], monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(pruning, "ROUNDS", rounds)
    model, path = small
    pair = modadd(5, 8, 3, 2)["train"]
    names = ["up.weight", "down.weight"]
    case = SimpleNamespace(trajectory=path, model=model, device=torch.device("cpu"))
    masks = pruning.rescored(case, pair, names, 0.3)  # type: ignore[arg-type]
    assert sum(int(mask.sum()) for mask in masks.values()) == 2 * 8 * 12 - round(0.7 * 2 * 8 * 12)
    once = score(path, model, [pair], "taylor", ignore=[n for n, _ in model.named_parameters() if n not in names]).importance
    plain = pruning.ranked_masks(once, once, 0.3)
    assert all(masks[name].equal(plain[name]) for name in names) == (rounds == 1)


def test_all_steps_rebuild_the_model_whatever_their_order() -> None:
    torch.manual_seed(0)
    path = torch.randn(9, 5, 4).log_softmax(-1)
    changes = torch.tensor([-3.0, 1.0, -0.5, 2.0, 0.1, -0.2, 0.3, -2.5])
    for order in steps.ORDERS:
        agreement, divergence = steps.judged(path, steps.ranked(changes, order, 0), torch.zeros(5))
        assert (agreement, divergence) == (100, pytest.approx(0, abs=1e-9)), order
    assert steps.ranked(changes, "by |change|", 0)[:3].tolist() == [0, 7, 3]
    assert steps.ranked(changes, "by decrease", 0)[[0, 1, -1]].tolist() == [0, 7, 3]
    assert steps.ranked(changes, "last steps", 0)[:2].tolist() == [7, 6]


def test_sections_are_replaced_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- begin steps -->\nold\n<!-- end steps -->\nafter\n")
    for text in (r"new \1 table", "newer"):
        write_section(document, "steps", text)
        assert document.read_text() == f"before\n<!-- begin steps -->\n{text}\n<!-- end steps -->\nafter\n"
    with pytest.raises(SystemExit, match="no marks for section fidelity"):
        write_section(document, "fidelity", "x")


def test_the_document_names_the_command_of_every_table() -> None:
    content = DOCUMENT.read_text(encoding="utf-8")
    for name in ("fidelity", "pruning", "grokking", "steps"):
        found = re.search(f"<!-- begin {name} -->\n(.*?)\n<!-- end {name} -->", content, re.DOTALL)
        assert found is not None, name
        assert re.search(rf"^`python benchmarks/reproduce\.py {name}\b", found[1], re.MULTILINE), name
