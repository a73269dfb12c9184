"""Attention heads: which rows and columns are whose, found by name or said by the user."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from prunekit import StructureError, UsageError, load, make_plan, masked, prune, save
from prunekit.structure import find_groups
from prunekit.structure.replacements import NarrowAttention
from prunekit.structure.units.heads import WIDTHS
from tests.structure_models import IMAGES, Attending, Attentive, Bert, Encoder, Packed, random_scores

BERT = {"q": "a", "k": "b", "v": "c", "o": "d", "heads": 3}


def test_a_unit_is_a_key_value_head_with_its_query_heads() -> None:
    (group,) = find_groups("heads", Attentive(kv_heads=2), IMAGES)
    assert group.name == "attention"
    assert group.members["attention.query.weight@0"].tolist() == [list(range(6)), list(range(6, 12))]
    assert group.members["attention.key.weight@0"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert group.members["attention.out.weight@1"].tolist() == [list(range(6)), list(range(6, 12))]
    assert "attention.value.bias@0" not in group.members
    assert group.attributes == {"attention:num_heads": 2, "attention:num_kv_heads": 1}


def test_packed_projections_give_rows_of_all_three() -> None:
    (group,) = find_groups("heads", Packed(), IMAGES)
    assert group.members["attention.in_proj_weight@0"][1].tolist() == [3, 4, 5, 15, 16, 17, 27, 28, 29]
    assert group.members["attention.out_proj.weight@1"][1].tolist() == [3, 4, 5]
    assert group.replace == {"attention": "attention"}


def test_the_heads_of_least_importance_go() -> None:
    model = Attentive()
    scores = random_scores(model)
    for name in ("query", "key", "value"):
        scores.importance[f"attention.{name}.weight"][3:6] = 0
    scores.importance["attention.out.weight"][:, 3:6] = 0
    plan = make_plan(scores, model, IMAGES, sparsity=0.2, structure="heads")
    assert plan.keep["attention"].tolist() == [True, False, True, True]
    small = prune(model, plan, IMAGES)
    assert small.attention.num_heads == small.attention.num_kv_heads == 3  # type: ignore[union-attr]


def test_attention_that_names_do_not_give_away_is_said_by_the_user() -> None:
    torch.manual_seed(0)
    model = Bert()
    with pytest.raises(StructureError, match=r"heads: no attention was found .*structure\.attention"):
        find_groups("heads", model, IMAGES)
    (group,) = find_groups("heads", model, IMAGES, [BERT])
    assert (group.name, group.size) == ("a", 3)
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.3, structure="heads", attention=[BERT])
    x = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(prune(model, plan, IMAGES)(x), masked(model, plan)(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"o": "nowhere"}, UsageError, r"structure\.attention: o is 'nowhere'"),
        ({"heads": None}, UsageError, r"structure\.attention: heads of a is not given"),
        ({"heads": 4}, StructureError, "a has 6 outputs, not a multiple of 4 heads"),
        ({"kv_heads": 2, "heads": 3}, StructureError, "b and c do not have the outputs of 2 key-value heads"),
        ({"o": "head"}, StructureError, "head has 4 inputs, not those of 3 heads"),
        ({"heads": 2}, StructureError, "does not run|outputs differ"),
    ],
)
def test_mappings_that_cannot_be_are_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        find_groups("heads", Bert(), IMAGES, [{**BERT, **change}])


def test_a_forward_that_does_not_follow_its_attribute_is_refused_by_name() -> None:
    class Stubborn(Attending):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
            return self.out((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Stubborn(size=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x.squeeze(1)).mean(1)

    torch.manual_seed(0)
    with pytest.raises(StructureError, match="heads: nothing can be removed: attention: "):
        find_groups("heads", Model(), IMAGES)


def test_attention_with_extra_keys_is_refused_by_name() -> None:
    model = Packed()
    model.attention = nn.MultiheadAttention(12, 4, batch_first=True, add_bias_kv=True)
    with pytest.raises(StructureError, match="attention: is a MultiheadAttention with add_bias_kv"):
        find_groups("heads", model, IMAGES)


def masks(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    attn = torch.rand(5, 6, generator=generator) < 0.3
    attn[:, 0] = False
    padding = torch.rand(2, 6, generator=generator) < 0.3
    padding[:, 0] = False
    if kind == "bool":
        return {"attn_mask": attn, "key_padding_mask": padding}
    if kind == "float":
        return {"attn_mask": torch.randn(5, 6, generator=generator).double()}
    return {}


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_narrow_attention_with_all_heads_is_torchs_own(other: bool, batch_first: bool, average: bool, kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 10} if other else {}
    dense = nn.MultiheadAttention(8, 4, batch_first=batch_first, **sizes).double().eval()
    nn.init.normal_(dense.in_proj_bias)
    ours = NarrowAttention(dense)
    q, k, v = (
        torch.randn(2, n, w, dtype=torch.float64) for n, w in ((5, 8), (6, sizes.get("kdim", 8)), (6, sizes.get("vdim", 8)))
    )
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    expected = dense(q, k, v, average_attn_weights=average, **masks(kind))
    found = ours(q, k, v, average_attn_weights=average, **masks(kind))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    assert ours.state_dict().keys() == dense.state_dict().keys()
    assert ours(q, k, v, need_weights=False, **masks(kind))[1] is None
    if kind != "bool":
        single = [t[0] if batch_first else t[:, 0] for t in (q, k, v)]
        torch.testing.assert_close(ours(*single, **masks(kind))[0], dense(*single, **masks(kind))[0])


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_fused_encoder_path_is_not_taken_for_fewer_heads(tmp_path: object, norm_first: bool) -> None:
    """Without gradients torch's encoder would hand the packed matrix to a kernel that knows only full heads."""
    torch.manual_seed(0)
    model = Encoder(norm_first).eval()
    x = torch.randn(6, 1, 4, 4)
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.2, structure="heads")
    small = prune(model, plan, IMAGES)
    save(small, plan, f"{tmp_path}/a")
    build: Callable[[], nn.Module] = lambda: Encoder(norm_first)  # noqa: E731
    back = load(f"{tmp_path}/a", build)
    fewer = [n for n, m in back.named_modules() if isinstance(m, NarrowAttention)]
    assert fewer
    assert all(back.get_submodule(n).num_heads < 4 for n in fewer)
    with torch.no_grad():
        without = back(x)
    torch.testing.assert_close(without, back(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(without, masked(model, plan)(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_width_that_an_attention_keeps_as_a_number_shrinks_with_its_heads(width: str) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = 4, 3
            setattr(self, width, 12)
            self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.proj(mixed.reshape(len(x), -1, getattr(self, width)))

    model = nn.Sequential(Kept(), nn.Linear(8, 2))
    (group,) = find_groups("heads", model, torch.randn(2, 5, 8))
    assert group.attributes == {"0:num_heads": 1, f"0:{width}": 3}


def family(model: nn.Module) -> list[dict[str, object]]:
    """What a user's function says of models whose names follow a pattern."""
    return [BERT]


def test_a_family_of_ones_own_stands_for_its_mappings() -> None:
    model = Bert()
    (said,), (made,) = (find_groups("heads", model, IMAGES, given) for given in ([BERT], [f"{__name__}:family"]))
    assert made.name == said.name
    assert {key: where.tolist() for key, where in made.members.items()} == {k: w.tolist() for k, w in said.members.items()}
    with pytest.raises(UsageError, match=r"structure.attention: .* has no 'famly'; did you mean family"):
        find_groups("heads", model, IMAGES, [f"{__name__}:famly"])
    with pytest.raises(UsageError, match=r"test_heads:Bert\(model\) failed: TypeError"):
        find_groups("heads", model, IMAGES, [f"{__name__}:Bert"])
