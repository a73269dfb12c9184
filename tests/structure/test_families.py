"""Names of layers that a recipe adds to the table of families."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunekit import UsageError
from prunekit.recipe.sections import Structure
from prunekit.structure import find_groups
from tests.structure_models import IMAGES, Feeding, TinyExperts, TinyRouter


class Named(nn.Module):
    """Attention, an MLP and experts, called as no family calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 4
        self.to_query, self.to_key, self.to_value = (nn.Linear(4, 8) for _ in range(3))
        self.merge = nn.Linear(8, 8)
        self.gate_it, self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.switch, self.bank = TinyRouter(4), TinyExperts(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        q, k, v = (p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.to_query, self.to_key, self.to_value))
        x = self.merge((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        x = (x + self.narrow(self.gate_it(x).sigmoid() * self.wide(x))).mean(1)
        _, scores, chosen = self.switch(x)
        return x + self.bank(x, chosen, scores)


ROW = {
    "q": "to_query", "k": "to_key", "v": "to_value", "o": "merge", "heads": "count", "up": ["gate_it", "wide"], "down": "narrow",
    "router": "switch", "experts": "bank",
}  # fmt: skip


def test_a_row_of_a_recipe_is_read_as_the_tables_are() -> None:
    torch.manual_seed(0)
    given = Structure.model_validate({"families": {"mine": ROW}}).mappings()
    sizes = {
        structure: {group.name: group.size for group in find_groups(structure, Named().eval(), IMAGES, given)}
        for structure in ("neurons", "experts")
    }
    assert sizes == {"neurons": {"wide": 12, "bank": 16}, "experts": {"": 4}}
    assert [group.size for group in find_groups("heads", Named().eval(), IMAGES, given)] == [4]


def test_neurons_without_known_names_are_read_from_the_operations() -> None:
    (group,) = find_groups("neurons", Feeding().eval(), IMAGES)
    assert (group.name, group.size, set(group.members)) == ("wide", 12, {"wide.weight@0", "wide.bias@0", "narrow.weight@1"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"q": "a", "k": "b", "o": "c"}, "give q, k, v and o"),
        ({"up": "a"}, "give up and down together"),
        ({"router": "a"}, "give router and experts together"),
        ({}, "names no layers"),
    ],
)
def test_rows_that_are_none(row: dict[str, str], said: str) -> None:
    with pytest.raises((UsageError, ValueError), match=said):
        Structure.model_validate({"families": {"mine": row}})
