"""K-FAC against straightforward float64 code: columns leave one after the other, and the others make up for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import ArtifactError, make_plan, score
from prunekit.apply import layerwise, masked
from prunekit.structure import find_groups
from tests.conftest import imported, tiny_data
from tests.criteria.material import text
from tests.transformer_models import built

DAMPING = 0.01
Reads = tuple[Tensor, Tensor, Tensor, list[list[int]]]
"""Of a layer that reads units: weight rows, ``H``, ``G``, and the columns of each unit."""


def plain(hidden: int = 9) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 4)).double()


def convolutions() -> nn.Sequential:
    torch.manual_seed(3)
    first, second = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 4, 3, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).double()


def moments(model: nn.Module, layer: str, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """``H``, damped, with a constant input behind the others where there is a bias, and ``G``: means over rows.

    Args:
        loss: the sum over all samples, times ``√(rows / samples)``.
    """
    module: Any = model.get_submodule(layer)
    x: list[Tensor] = []
    out: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor], made: Tensor) -> Tensor:
        x.append(args[0].detach().clone())
        out.append(made)
        return made.clone()  # so that nobody changes it in place

    hook = module.register_forward_hook(note)
    total = loss()
    hook.remove()
    (g,) = torch.autograd.grad(total, out)
    rows = x[0]
    if isinstance(module, nn.Conv2d):
        rows, g = F.unfold(rows, module.kernel_size, padding=module.padding).transpose(1, 2), g.flatten(2).transpose(1, 2)
    rows, g = rows.flatten(0, -2).double(), g.flatten(0, -2).double()
    size = rows.shape[1]
    if module.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    h = rows.T @ rows / len(rows)
    h = h + DAMPING * h.diagonal()[:size].mean() * torch.eye(len(h), dtype=h.dtype)
    return h, g.T @ g


def cost(reads: Sequence[Reads], gone: Sequence[int]) -> float:
    """What removing these units costs, all other columns at their best: a linear system solved anew."""
    total = 0.0
    for weight, h, g, columns in reads:
        places = [column for unit in gone for column in columns[unit]]
        stay = [column for column in range(len(h)) if column not in places]
        change = torch.zeros(len(weight), len(h), dtype=h.dtype)
        change[:, places] = -weight[:, places]
        change[:, stay] = -torch.linalg.solve(h[stay][:, stay], h[stay][:, places] @ change[:, places].T).T
        total += float(torch.trace(g @ change @ h @ change.T)) / 2
    return total


def in_turn(reads: Sequence[Reads], count: int) -> list[float]:
    gone: list[int] = []
    found = [0.0] * count
    greatest = 0.0
    while len(gone) < count:
        before = cost(reads, gone)
        each = {unit: cost(reads, [*gone, unit]) - before for unit in range(count) if unit not in gone}
        unit = min(each, key=each.__getitem__)
        greatest = max(greatest, each[unit])
        found[unit] = greatest
        gone.append(unit)
    return found


def test_units_cost_what_is_lost_when_their_turn_comes() -> None:
    model, (x, y) = plain(), tiny_data(40, torch.float64)
    found = score(imported(model), model, [(x[:15], y[:15]), (x[15:], y[15:])], "kfac")
    h, g = moments(model, "3", lambda: F.cross_entropy(model(x), y, reduction="sum") / 40**0.5)
    expected = in_turn([(model[3].weight.detach(), h, g, [[j] for j in range(9)])], 9)
    (group,) = find_groups("channels", model, x[:2])
    torch.testing.assert_close(found.group(group.members).tolist(), expected, rtol=1e-6, atol=0)


def test_a_weight_costs_what_its_output_loses_when_the_others_make_up_for_it() -> None:
    model, (x, y) = plain(), tiny_data(40, torch.float64)
    found = score(imported(model), model, [(x[:15], y[:15]), (x[15:], y[15:])], "kfac")
    for layer in ("1", "3"):
        h, g = moments(model, layer, lambda: F.cross_entropy(model(x), y, reduction="sum") / 40**0.5)
        weight = model.get_parameter(f"{layer}.weight").detach()
        inverse = torch.linalg.inv(h).diagonal()[:-1]
        expected = weight.square() * g.diagonal()[:, None] / inverse / 2
        torch.testing.assert_close(found.importance[f"{layer}.weight"], expected)


def test_channels_are_read_by_patches_and_behind_a_flattening() -> None:
    model, (x, y) = convolutions(), tiny_data(40, torch.float64)
    found = score(imported(model), model, [(x, y)], "kfac")
    groups = {group.name: group for group in find_groups("channels", model, x[:2])}
    for name, reader, block in (("0", "2", 9), ("2", "5", 4)):
        h, g = moments(model, reader, lambda: F.cross_entropy(model(x), y, reduction="sum") / 40**0.5)
        columns = [list(range(j * block, (j + 1) * block)) for j in range(groups[name].size)]
        weight = model.get_parameter(f"{reader}.weight").detach().flatten(1)
        expected = in_turn([(weight, h, g, columns)], groups[name].size)
        torch.testing.assert_close(found.group(groups[name].members).tolist(), expected, rtol=1e-6, atol=0)


class Forked(nn.Module):
    """Units that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(16, 7), nn.Linear(7, 4), nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.flatten(1)))
        found: Tensor = self.left(hidden) * torch.sigmoid(self.right(hidden))
        return found


def test_what_several_layers_read_is_lost_in_all_of_them() -> None:
    torch.manual_seed(3)
    model, (x, y) = Forked().double(), tiny_data(40, torch.float64)
    found = score(imported(model), model, [(x, y)], "kfac")
    reads: list[Reads] = []
    for layer in ("left", "right"):
        h, g = moments(model, layer, lambda: F.cross_entropy(model(x), y, reduction="sum") / 40**0.5)
        reads.append((model.get_parameter(f"{layer}.weight").detach(), h, g, [[j] for j in range(7)]))
    (group,) = find_groups("channels", model, x[:2])
    torch.testing.assert_close(found.group(group.members).tolist(), in_turn(reads, 7), rtol=1e-6, atol=0)


def test_of_two_neurons_that_say_the_same_one_is_free_and_the_other_is_not() -> None:
    model, (x, y) = plain(), tiny_data(60, torch.float64)
    with torch.no_grad():
        model[1].weight[4], model[1].bias[4] = model[1].weight[2], model[1].bias[2]
        model[3].weight[:, [2, 4]] += 2
    found = score(imported(model), model, [(x, y)], "kfac(damping=0.000001)")
    (group,) = find_groups("channels", model, x[:2])
    values = found.group(group.members)
    first, second = sorted((float(values[2]), float(values[4])))
    assert first == float(values.min())
    assert first < 1e-4 * float(values.median())
    assert second > float(values.median())
    plan = make_plan(found, model, x[:2], sparsity=0.1, structure="channels")
    restored = layerwise(model, plan.masks(), [(x, y)], damping=1e-9)
    torch.testing.assert_close(restored(x), model(x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(masked(model, plan)(x), model(x), rtol=0.1, atol=0.1)


@pytest.mark.slow  # it imports transformers
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_and_neurons_of_language_models(family: str) -> None:
    model, _ = built(family)
    inputs, labels = text(5)
    ignore = {"llama": ["*embed*"], "gpt2": ["*wte*"]}[family]
    found = score(imported(model), model, [(inputs, labels)], "kfac", task="causal_lm", ignore=ignore)
    layers = {
        "llama": {"heads": "model.layers.1.self_attn.o_proj", "neurons": "model.layers.1.mlp.down_proj"},
        "gpt2": {"heads": "transformer.h.1.attn.c_proj", "neurons": "transformer.h.1.mlp.c_proj"},
    }[family]
    assert make_plan(found, model, inputs, sparsity=0.3, structure="heads+neurons").sparsity()["prunable"] > 0.2
    model = model.double()
    groups = {group.name: group for group in find_groups("heads+neurons", model, inputs)}
    counted = int((labels[:, 1:] != -100).sum())

    def loss() -> Tensor:
        logits = model(**inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / counted**0.5

    for layer in layers.values():
        h, g = moments(model, layer, loss)
        weight = model.get_parameter(f"{layer}.weight").detach()
        axis = int(family == "llama")
        (group,) = [one for one in groups.values() if f"{layer}.weight@{axis}" in one.members]
        reads = [(weight if axis else weight.T, h, g, group.members[f"{layer}.weight@{axis}"].tolist())]
        torch.testing.assert_close(found.group(group.members).tolist(), in_turn(reads, group.size), rtol=1e-3, atol=1e-9)


def test_inputs_that_are_always_0_cost_nothing() -> None:
    model, (x, y) = plain(), tiny_data(40, torch.float64)
    with torch.no_grad():
        model[1].bias[[1, 6]] = -1e3
    found = score(imported(model), model, [(x, y)], "kfac")
    (group,) = find_groups("channels", model, x[:2])
    values = found.group(group.members)
    assert float(values[1]) == float(values[6]) == 0 < float(values[[0, 2, 3, 4, 5, 7, 8]].min())
    assert not found.importance["3.weight"][:, [1, 6]].any()


def test_a_product_with_other_scores_is_of_the_units_scores() -> None:
    model, (x, y) = plain(), tiny_data(40, torch.float64)
    path = imported(model)
    both, one, other = (score(path, model, [(x, y)], name) for name in ("kfac^0.5*magnitude^0.5", "kfac", "magnitude"))
    (group,) = find_groups("channels", model, x[:2])
    expected = (one.group(group.members) * other.group(group.members).double()).sqrt()
    torch.testing.assert_close(both.group(group.members).double(), expected)


def test_what_it_says_nothing_of_is_refused() -> None:
    model, (x, y) = plain(), tiny_data(8, torch.float64)
    found = score(imported(model), model, [(x, y)], "kfac")
    assert "kfac says nothing of layers" in str(found.unsuited("layers"))
    (group,) = find_groups("channels", model, x[:2])
    other = {key: index[:4] for key, index in group.members.items()}
    with pytest.raises(ArtifactError, match=r"hold no units 1\.bias@0 of this kind"):
        found.group(other)


@pytest.mark.slow  # it imports transformers
def test_one_file_has_units_of_every_structure() -> None:
    model, _ = built("llama")
    inputs, labels = text(4)
    found = score(imported(model), model, [(inputs, labels)], "kfac", task="causal_lm", ignore=["*embed*"])
    for structure in ("heads", "neurons", "channels"):
        for group in find_groups(structure, model, inputs):
            values = found.group(group.members)
            assert values.shape == (group.size,)
            assert float(values.min()) >= 0
