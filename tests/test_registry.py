"""One mechanism for all kinds: a table's own names, import paths, and what installed packages offer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prunekit import TASKS, UsageError, score
from prunekit.criteria import CRITERIA, Evidence, check_criterion, expand
from prunekit.recipe import Recipe
from prunekit.registry import Registry, offered
from prunekit.structure import GROUPED, Group, check_structure, find_groups
from prunekit.task import Regression, get_task
from prunekit.trajectory.rules import RULES, SGD, find_rule
from tests.conftest import imported

OFFERED = """
[prunekit.criteria]
steady = offered:steady
magnitude = offered:steady
gone = offered_no_more:steady
absent = offered:nothing
number = offered:NUMBER

[prunekit.structures]
halves = offered:halves

[prunekit.optimizers]
offered.Descent = offered:Rule

[prunekit.tasks]
amounts = offered:Amounts
"""
MODULE = """
import torch
from prunekit.structure import Group
from prunekit.task import Regression
from prunekit.trajectory.rules import SGD

NUMBER = 7


def steady(evidence):
    return {name: torch.full_like(weight, 2.0) for name, weight in evidence.weights().items() if name in evidence.prunable}


def halves(model, example_inputs):
    units = torch.arange(len(model[0].weight)).view(2, -1)
    return [Group("0", {"0.weight@0": units, "0.bias@0": units, "2.weight@1": units})]


class Rule(SGD):
    pass


class Amounts(Regression):
    name = "amounts"
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that offers one thing of each kind, and a second one that offers ``halves`` too."""
    for name, points in (("offering-package", OFFERED), ("other-package", "[prunekit.criteria]\ntwice = a:b\n")):
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    (tmp_path / "offered.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    offered.cache_clear()
    yield tmp_path
    offered.cache_clear()
    sys.modules.pop("offered", None)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def test_a_package_offers_each_kind_by_name(packages: Path) -> None:
    model, x, y = small(), torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])
    found = score(imported(model), model, [(x, y)], "steady^0.5*magnitude^0.5")
    assert torch.allclose(
        found.importance["0.weight"], (2 * model[0].weight.abs().double()).sqrt().to(found.importance["0.weight"])
    )
    (group,) = find_groups("halves", model, x)
    assert group.members["2.weight@1"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert type(find_rule("offered.Descent")).__name__ == "Rule"
    assert get_task("amounts").name == "amounts"
    for table, name in ((CRITERIA, "steady"), (GROUPED, "halves"), (RULES, "offered.Descent"), (TASKS, "amounts")):
        assert name in table
        assert name in table.names()
        assert name not in list(table)


def test_names_of_the_table_win_and_nothing_is_imported_for_them(packages: Path) -> None:
    assert CRITERIA["magnitude"].describes.startswith("absolute weight")
    assert expand("tempered(steady)")[2] == "magnitude^0.75*steady^0.25"
    check_structure("halves")
    assert "offered" not in sys.modules


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gone",
            r"criterion 'gone' of package offering-package \(entry point in prunekit.criteria\): .* no module 'offered_no_more'",
        ),
        ("absent", r"'absent' of package offering-package .* has no 'nothing'"),
        ("number", r"'number' is a int; it must be a Criterion or a function"),
        ("stedy", r"'stedy' does not exist; did you mean steady\?"),
    ],
)
def test_a_broken_offer_is_told_with_its_package(packages: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        check_criterion(name)
    assert "\n" not in str(caught.value)


def test_two_packages_with_the_same_name_are_told_apart_by_nobody(packages: Path) -> None:
    other = packages / "other_package-1.0.dist-info" / "entry_points.txt"
    other.write_text("[prunekit.criteria]\nsteady = elsewhere:steady\n")
    offered.cache_clear()
    with pytest.raises(UsageError, match=r"offered by (offering|other)-package and (other|offering)-package; uninstall one"):
        check_criterion("steady")


def test_reading_a_recipe_imports_nothing(packages: Path) -> None:
    recipe = Recipe.of(
        {
            "model": {"factory": "nowhere:build"},
            "task": "nowhere:task",
            "score": {
                "criteria": ["nowhere:mine(group=l1)", "steady", "rank(nowhere:mine)"],
                "optimizer_rules": {"nowhere.Mine": "nowhere:Rule"},
            },
            "structure": {"attention": ["nowhere:family"]},
            "compare": {"structures": ["nowhere:blocks", "halves"]},
            "prune": [{"name": "a", "criterion": "nowhere:mine*magnitude", "structure": "nowhere:blocks", "sparsity": 0.5}],
        },
        "r.yaml",
    )
    assert recipe.score.criteria == ["nowhere:mine(group=l1)", "steady", "rank(nowhere:mine)"]
    assert recipe.prune[0].criterion == "magnitude*nowhere:mine"
    assert not {"nowhere", "offered"} & sys.modules.keys()


@pytest.mark.parametrize("wrong", ["a:", ":b", "a b:c", "a:b:c", "a..b:c", "1a:b", "a:2b", "a-b:c", "../a:b", "a:b;c", ""])
def test_only_import_paths_are_import_paths(wrong: str) -> None:
    table: Registry[int] = Registry("thing", "prunekit.things", lambda found, name: found, {"one": 1})
    assert wrong not in table
    with pytest.raises(UsageError, match=r"thing .* does not exist; .*or module:thing of your own"):
        table[wrong]


@pytest.mark.slow
def test_importing_prunekit_looks_for_no_packages() -> None:
    code = (
        "from prunekit import score, prune, Recorder, TASKS; from prunekit.recipe import Recipe; "
        "from prunekit.registry import offered; print('classification' in TASKS, offered.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True 0\n", done.stderr


def ones(evidence: Evidence) -> dict[str, torch.Tensor]:
    """As important as all others."""
    return {name: torch.ones_like(weight) for name, weight in evidence.weights().items() if name in evidence.prunable}


def task(**options: object) -> Regression:
    return Regression(**options)


def no_groups(model: nn.Module, example: torch.Tensor) -> list[Group]:
    return []


def lost(model: nn.Module, example: torch.Tensor) -> list[Group]:
    return [Group("x", {"5.weight@0": torch.arange(4).view(-1, 1)})]


def too_far(model: nn.Module, example: torch.Tensor) -> list[Group]:
    return [Group("x", {"0.weight@0": torch.arange(8).view(-1, 1)})]


def unsound(model: nn.Module, example: torch.Tensor) -> list[Group]:
    """Rows that leave without what reads them."""
    return [Group("x", {"0.weight@0": torch.arange(6).view(-1, 1)})]


def fails(*anything: object) -> None:
    raise ValueError("not today")


def test_import_paths_of_each_kind() -> None:
    assert CRITERIA[f"{__name__}:ones"].describes == "As important as all others."
    assert get_task(f"{__name__}:task").name == "regression"
    assert isinstance(find_rule("my.Optimizer", {"my.Optimizer": f"{SGD.__module__}:SGD"}), SGD)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_groups", "the model has no such units"),
        ("lost", r"'5.weight@0' of group 'x' is no <parameter>@<axis>"),
        ("too_far", "must hold whole numbers from 0 to 5"),
        ("unsound", "nothing can be removed: x: the model does not run without some of its units"),
        ("fails", "failed: ValueError: not today"),
        ("SEED", "is int; it must be a Structure or a function"),
    ],
)
def test_a_users_groups_are_looked_at(name: str, said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        find_groups(f"{__name__}:{name}", small(), torch.randn(2, 4))
    assert "\n" not in str(caught.value)


SEED = 0


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda w: {}, "importance of 0.weight is NoneType"),
        (lambda w: {n: t[0] for n, t in w.items()}, r"importance of 0.weight is shape \(4,\); its weights have \(6, 4\)"),
        (lambda w: 3, "gave a int; it must give a CriterionResult"),
        (lambda w: {n: -t.abs() - 1 for n, t in w.items()}, "has a negative importance"),
        (lambda w: {n: t / 0 for n, t in w.items()}, "holds NaN or Inf"),
        (lambda w: fails(), "failed: ValueError: not today"),
    ],
)
def test_what_a_users_criterion_gives_is_looked_at(result: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ones", lambda evidence: result(evidence.weights()))  # type: ignore[operator]
    model = small()
    with pytest.raises(Exception, match=said) as caught:
        score(imported(model), model, [(torch.randn(4, 4), torch.tensor([0, 1, 1, 0]))], f"{__name__}:ones")
    assert "\n" not in str(caught.value)


def test_options_of_a_users_criterion_are_those_that_it_accepts() -> None:
    with pytest.raises(UsageError, match="has no option 'group'; it takes none"):
        check_criterion(f"{__name__}:ones(group=l1)")
    with pytest.raises(UsageError, match=r"has no option 'grup'"):
        expand(f"{__name__}:ones(grup=l1)")
