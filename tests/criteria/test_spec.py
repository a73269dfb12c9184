"""Names of criteria: one canonical text each, and one file name."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit import UsageError
from prunekit.criteria import CRITERIA, DEFAULT, expand, parse, score_slug
from prunekit.criteria.aggregations import AGGREGATIONS, written
from prunekit.criteria.spec import OPTIONS, RESERVED, TEMPERS, Product, Rank, Single, product, slug, text_of
from prunekit.kernel import SHARES
from prunekit.task import TARGET_NAMES

VALUES = {
    "target": st.sampled_from(list(TARGET_NAMES)),
    "share": st.sampled_from(list(SHARES)),
    "aggregation": st.sampled_from(sorted({written(name) for name in AGGREGATIONS})),
    "nodes": st.integers(1, 10**4).map(str),
    "group": st.sampled_from(["l1", "l2"]),
    "damping": st.decimals("0.0001", "1", places=4).map(lambda d: format(d.normalize(), "f")),
}


@st.composite
def singles(draw: st.DrawFn) -> Single:
    name = draw(st.sampled_from([*CRITERIA, "my_module:mine", "a.b_2.c:d.mine_3"]))
    accepts = CRITERIA[name].accepts if CRITERIA.is_own(name) else tuple(OPTIONS)
    chosen = draw(st.lists(st.sampled_from(accepts), unique=True)) if accepts else []
    return Single(name, tuple((key, draw(VALUES[key])) for key in OPTIONS if key in chosen))


powers = st.decimals("0.001", "25", places=3)  # four of them joined stay within the 100 allowed
products = st.lists(st.tuples(singles(), powers), min_size=1, max_size=3).map(product)
ranks = st.lists(products, min_size=1, max_size=3).map(lambda parts: Rank(tuple(sorted(parts, key=lambda p: p.text))))
specs = st.one_of(singles(), products, ranks)


@pytest.mark.slow
@given(specs)
def test_canonical_text_is_read_back_and_stays(spec: Single | Product | Rank) -> None:
    text = spec.text
    assert expand(text) == [text]
    spaced = re.sub(r"([(),=^*+])", r" \1 ", text)
    assert expand(f" {spaced} ") == [text]


@given(specs)
def test_slugs_are_safe_file_names_that_can_be_read_back(spec: Single | Product | Rank) -> None:
    found = slug(spec)
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*[a-z0-9]", found)  # lower case: safe where case does not count
    assert len(f".{found}.partial.safetensors") <= 255 - 40
    if "-----" in found:
        with pytest.raises(ValueError, match="was cut"):
            text_of(found)
    else:
        assert text_of(found) == spec.text


@pytest.mark.slow
@given(specs, specs)
def test_slugs_are_unique(one: Single | Product | Rank, other: Single | Product | Rank) -> None:
    assert (slug(one) == slug(other)) == (one.text == other.text)


@given(st.lists(st.tuples(singles(), powers), min_size=2, max_size=4))
def test_order_of_factors_does_not_matter(factors: list[tuple[Single, Decimal]]) -> None:
    assert product(factors).text == product(factors[::-1]).text


def test_an_older_name_of_an_aggregation_is_the_same_criterion_and_file() -> None:
    assert expand("taylor(aggregation=abs_mean)") == expand("taylor(aggregation=mean)")
    assert score_slug("taylor(aggregation=abs_mean)") == "taylor.aggregation-mean"


def test_examples_of_the_documentation() -> None:
    name = "influence(aggregation=l2, target=margin, share=survival)"
    assert expand(name) == ["influence(target=margin,share=survival,aggregation=l2)"]
    assert score_slug(name) == "influence.target-margin.share-survival.aggregation-l2"
    assert score_slug("influence^0.25*magnitude^0.75") == "influence--0.25---magnitude--0.75"
    assert score_slug("rank(magnitude)+rank(influence)") == "rank-influence----rank-magnitude"
    assert score_slug("magnitude") == "magnitude"
    assert score_slug("my_package.mine:steady") == "my_package..mine...steady"
    assert score_slug("mine:Steady").startswith("mine...steady-----") != score_slug("mine:steady")
    assert expand("tempered(mine:steady)")[1] == "magnitude^0.9*mine:steady^0.1"
    assert expand("magnitude*influence^.50*magnitude") == ["influence^0.5*magnitude^2"]
    long = "*".join(f"influence(target=margin,share=survival,aggregation=l2,nodes={n})" for n in range(1, 5))
    assert "-----" in score_slug(long)
    assert score_slug(long) != score_slug(long.replace("nodes=4", "nodes=5"))


def test_tempered_stands_for_every_power() -> None:
    assert expand("tempered(influence)") == [
        "magnitude", "influence^0.1*magnitude^0.9", "influence^0.25*magnitude^0.75", "influence^0.5*magnitude^0.5",
        "influence^0.75*magnitude^0.25", "influence",
    ]  # fmt: skip
    assert len(expand("tempered(taylor(target=margin,aggregation=l2))")) == len(TEMPERS)
    assert expand("tempered(influence*magnitude)")[2] == "influence^0.25*magnitude"
    assert expand("tempered(magnitude)") == ["magnitude"]
    with pytest.raises(UsageError, match="stands for 6 compositions"):
        parse("tempered(influence)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("influenc", "criterion 'influenc' does not exist; did you mean influence"),
        ("influenc*magnitude", "'influenc' does not exist .*did you mean influence"),
        ("influence(targt=margin)", "no option 'targt'; did you mean target"),
        ("influence(target=margn)", "target is 'margn'; did you mean margin"),
        ("influence(nodes=0)", "whole number from 1"),
        ("influence(nodes=1,nodes=2)", "nodes is given twice"),
        ("magnitude(target=margin)", "magnitude has no option 'target'; known: group"),
        ("random(group=l1)", "it takes none"),
        ("survival(share=whole)", "no option 'share'"),
        ("obs(damping=0)", "above 0"),
        ("obs(damping=x)", "above 0"),
        ("influence^0*magnitude", "exponent 0 must be above 0"),
        ("influence^101", "at most 100"),
        ("influence^60*influence^60", "exponents of influence add up to 120"),
        ("influence^x", "'x' is not a number"),
        ("influence^", "expected a name or a number where its end"),
        ("influence^-1", "'-' has no meaning"),
        ("influence+magnitude", r"write rank\(...\)\+rank\(...\)"),
        ("rank(influence)*magnitude", r"'\*' has no meaning"),
        ("magnitude*rank(influence)", "cannot stand inside"),
        ("tempered(tempered(influence))", "cannot stand inside"),
        ("tempered(rank(influence))", "cannot stand inside"),
        ("influence(target=margin", r"expected '\)'"),
        ("influence()", r"no option '\)'"),
        ("", "its end"),
        ("influence/../x", "'/' has no meaning"),
        ("influence;magnitude", "';' has no meaning"),
    ],
)
def test_what_is_not_a_name_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        expand(text)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@given(st.text(alphabet="influence(tar=gm)^*+0.5,rk ", max_size=40))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        names = expand(text)
    except UsageError:
        return
    for name in names:
        assert expand(name) == [name]


def test_the_dict_holds_names_that_the_syntax_can_say() -> None:
    for name, criterion in CRITERIA.items():
        assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", name)
        assert name not in RESERVED
        assert set(criterion.accepts) <= set(OPTIONS)
        assert not set(criterion.accepts) & set(criterion.preset)
        assert all(OPTIONS[key](value) == value for key, value in criterion.preset.items())
    assert set(DEFAULT) <= set(CRITERIA)
