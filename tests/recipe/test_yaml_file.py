"""What plain text in a recipe means: numbers are numbers, quoted text is text, and what is written reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import UsageError
from prunekit.recipe import Recipe
from prunekit.recipe.yaml_file import read_yaml, to_yaml

RECIPE = 'seed: 0\nmodel: {{factory: "mine:build", args: {{value: {0}}}}}\ndata: {{factory: "mine:data"}}\n'


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """What a factory gets for ``args: {value: TEXT}``."""

    def reading(text: str) -> Any:
        (tmp_path / "r.yaml").write_text(RECIPE.format(text))
        return Recipe.load(tmp_path / "r.yaml").model.args["value"]

    return reading


@pytest.mark.parametrize(
    "text", ["2e-5", "1e-2", "1E+3", "-1e3", ".5e1", "+.5", "-.5", "1.e2", "1.0e5", "1e5", "0.1", "0e0", "00.5", "007e1"]
)
def test_numbers_with_an_exponent_or_without_a_nought_are_numbers(text: str, read: Any) -> None:
    assert read(text) == float(text)
    assert type(read(text)) is float
    assert read(f"[{text}]") == [float(text)]
    for quote in "'\"":
        assert read(f"{quote}{text}{quote}") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-12", -12), ("+3", 3), ("1_000", 1000), ("0x1F", 31), ("0b101", 5), ("1_000.5", 1000.5), ("1_0e2", 1000.0),
     (".inf", float("inf")), ("-.INF", -float("inf")), ("yes", True), ("no", False), ("on", True), ("off", False), ("true", True),
     ("~", None), ("null", None), ("{1: a}", {1: "a"})],
)  # fmt: skip
def test_what_yaml_has_otherwise_stays(text: str, value: Any, read: Any) -> None:
    assert read(text) == value
    assert type(read(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    ["1:30", "1:30:00", "2024-01-01", "2024-01-01 10:00:00", "=", "inf", "nan", "e5", "1e", "1e+", ".e1", "1.2.3", "1e5x", "--1",
     "-", ".", "0o17", "12e3e4", "٣e2", "y", "n"],
)  # fmt: skip
def test_what_is_no_number_is_text(text: str, read: Any) -> None:
    assert read(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("010", "line 2: 010 is octal to some and decimal to others; write 10, or '010' for text"),
        ("1e400", "line 2: 1e400 is larger than any number"),
        ("0x_", "line 2: '0x_' is no number"),
        ("!!set {a, b}", "line 2: a value of type !!set cannot be held in a recipe"),
        ("!!binary aGk=", "line 2: a value of type !!binary"),
        ("!!timestamp 2024-01-01", "line 2: a value of type !!timestamp"),
        ("{[1]: 2}", "line 2: a key is text or a number, not a list or mapping"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("&a [*a]", "or one holds itself"),
        ("&a {b: *a}", "or one holds itself"),
    ],
)
def test_what_means_two_things_is_refused_with_its_line(text: str, said: str, read: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        read(text)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_aliases_that_stand_for_too_much_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="stand for more than 100,000 values"):
        read_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is given twice; it is on line 1 already"),
        ("x:\n  lr: 1\n\n  lr: 2\n", "line 4: key 'lr' is given twice; it is on line 2 already"),
        ("x: [{lr: 1, lr: 1}]\n", "line 1: key 'lr' is given twice"),
        ("x: {1: a, 1.0: b}\n", "key 1.0 is given twice"),
        ("x: {'1': a, 1: b}\n", None),
    ],
)
def test_a_key_given_twice_is_refused_by_name(text: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    if said is None:
        assert read_yaml(tmp_path / "r.yaml") == {"x": {"1": "a", 1: "b"}}
        return
    with pytest.raises(UsageError) as refusal:
        read_yaml(tmp_path / "r.yaml")
    assert said in str(refusal.value)


def test_merged_keys_are_merged_and_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: &b {q: 1, r: 2}\nmine: {<<: *b, r: 1e-3}\n")
    assert read_yaml(tmp_path / "r.yaml")["mine"] == {"q": 1, "r": 1e-3}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
LOOKS = st.from_regex(r"[-+.:_0-9eEx=]{1,7}", fullmatch=True)
KEYS = st.text(max_size=4) | LOOKS | st.integers()
VALUES = st.recursive(
    SCALARS | LOOKS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(args=st.dictionaries(st.text(max_size=5) | LOOKS, VALUES, max_size=3))
def test_a_resolved_recipe_reads_back_as_the_same_values(args: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = Recipe.of({"seed": 0, "model": {"factory": "m:b", "args": args}, "data": {"factory": "m:d"}}, "test")
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.save(path)
    back = Recipe.resolved(read_yaml(path), path)
    assert repr(back.model.args) == repr(args)  # types too
    assert back == recipe


@pytest.mark.parametrize("value", [1e-05, 2e-05, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 1e16, 1e22, -0.0, 123456.0])
def test_floats_are_written_to_the_last_bit(value: float, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(to_yaml({"value": value}))
    assert repr(read_yaml(tmp_path / "r.yaml")["value"]) == repr(value)


def test_a_number_where_text_belongs_is_told_to_be_quoted(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('seed: 0\nmodel: {factory: 1e3}\ndata: {factory: "m:d"}\n')
    with pytest.raises(UsageError, match=r"model.factory is 1000.0: this is text; write it in quotes"):
        Recipe.load(tmp_path / "r.yaml")
