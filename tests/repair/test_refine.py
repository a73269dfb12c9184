"""Refined plans: never worse on what accepts, exact in number, repeatable, and valid however the search ends."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunekit import ArtifactError, Plan, UsageError, make_plan, masked, prune, refine
from prunekit.measure import kl
from prunekit.repair.objective import make_objective
from prunekit.repair.swaps import Groups, Runs, get_swaps
from prunekit.task import Classification
from prunekit.trajectory import Layout
from tests.conftest import tiny_data
from tests.structure_models import ATTENTIVE, HANDLED, IMAGES, STACKED, random_scores

Batches = list[tuple[Tensor, Tensor]]
BUILD = {**HANDLED, **ATTENTIVE, **STACKED}
EVERY = [("unstructured", "residual"), ("2:4", "residual"), ("block:2x2", "flattened"), ("channels", "residual"),
         ("heads", "separate"), ("heads", "packed"), ("layers", "pre-norm"), ("layers", "blocks")]  # fmt: skip


@cache
def _trained(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = BUILD[name]().to(dtype)
    x, _ = tiny_data(96, dtype)
    y = x.flatten(1)[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval(), x, y


def trained(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batches]:
    """A model that has learnt something, so that masks matter, and samples."""
    model, x, y = _trained(name, dtype)
    torch.manual_seed(0)  # whether it was trained just now or before
    return copy.deepcopy(model), list(zip(x.clone().split(40), y.clone().split(40), strict=True))


def kl_of(model: nn.Module, plan: Plan, batches: Batches) -> float:
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        return kl(masked(model, plan)(x), model(x))


class Noted:
    """The swaps of the plan, given to ``refine`` as those of the user's; it keeps every mask that it proposes."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def __call__(self, plan: Plan, layout: Layout, device: torch.device) -> Noted:
        self.true = get_swaps(plan, layout, device)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.true, name)

    def select(self, *arguments: Any) -> Tensor:
        self.masks.append(self.true.select(*arguments))
        return self.masks[-1]

    def exchange(self, *arguments: Any) -> Tensor:
        self.masks.append(self.true.exchange(*arguments))
        return self.masks[-1]


def planned(model: nn.Module, structure: str, sparsity: float, seed: int = 0, **options: Any) -> Plan:
    share = None if structure == "2:4" else sparsity
    return make_plan(random_scores(model, seed), model, IMAGES, sparsity=share, structure=structure, **options)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    case=st.sampled_from(EVERY),
    sparsity=st.sampled_from([0.0, 0.3, 0.6, 0.9]),
    seed=st.integers(0, 3),
    target=st.sampled_from(["kl", "loss"]),
)
def test_never_worse_where_it_is_accepted(case: tuple[str, str], sparsity: float, seed: int, target: str) -> None:
    structure, name = case
    model, batches = trained(name)
    plan = planned(model, structure, sparsity, seed)
    refined = refine(plan, model, batches, rounds=4, steps=6, seed=seed, target=target, share=0.2)
    assert {n: k.shape for n, k in refined.keep.items()} == {n: k.shape for n, k in plan.keep.items()}
    assert sum(int(k.sum()) for k in refined.keep.values()) == sum(int(k.sum()) for k in plan.keep.values())
    assert refined.sparsity() == plan.sparsity()
    refined.check("refined")
    # the accept part's divergence of both plans, computed again
    objective = make_objective(model, batches, target, "margin", task=Classification(), seed=seed)
    before, after = (objective.on_accept(factors(objective, p)) for p in (plan, refined))
    assert after <= before
    facts = refined.provenance["refine"]
    assert facts["before"]["accept"] == pytest.approx(before, rel=1e-6, abs=1e-9)
    assert facts["after"]["accept"] == pytest.approx(after, rel=1e-6, abs=1e-9)
    small = prune(model, refined, IMAGES)
    x = batches[0][0]
    torch.testing.assert_close(small(x), masked(model, refined)(x), atol=1e-4, rtol=1e-4)


def factors(objective: Any, plan: Plan) -> Tensor:
    layout, masks = objective.function.layout, plan.masks()
    ones = {e.name: torch.ones(e.shape) for e in layout}
    return layout.flatten({n: masks.get(n, one.bool()).float() for n, one in ones.items()})


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "name"), EVERY)
def test_the_count_is_exact_after_every_round(structure: str, name: str) -> None:
    model, batches = trained(name)
    plan, noted = planned(model, structure, 0.4), Noted()
    refined = refine(plan, model, batches, rounds=8, steps=20, share=0.3, swaps=noted)
    assert len(noted.masks) >= len(refined.history) - 1 > 4  # the first is the plan's own
    assert {int(mask.sum()) for mask in noted.masks} == {int(noted.true.keep.sum())}


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "block:2x2", "channels"])
def test_ratios_and_floors_hold_after_every_round(structure: str) -> None:
    model, batches = trained("flattened")
    ratio = {"hidden" if structure == "channels" else "hidden.weight": 0.5}
    plan, noted = planned(model, structure, 0.45, ratios=ratio, floor=0.3), Noted()
    refined = refine(plan, model, batches, rounds=8, steps=20, share=0.3, swaps=noted)
    assert refined.provenance["ratios"] == ratio
    assert refined.provenance["floor"] == 0.3
    assert len(noted.masks) >= len(refined.history) - 1 > 4
    for tried in map(noted.true.plan, noted.masks):
        for name, keep in tried.keep.items():
            if name in ratio:
                assert int(keep.sum()) == int(plan.keep[name].sum())
            assert int(keep.sum()) >= min(0.3 * keep.numel(), int(plan.keep[name].sum()))


@pytest.mark.slow
def test_runs_of_an_edited_plan_are_kept() -> None:
    model, batches = trained("multilayer")
    scores = random_scores(model)
    scores.provenance["prunable"] = ["one.weight"]
    plan = make_plan(scores, model, sparsity=0.0)
    keep = torch.zeros(9, 4, 4, dtype=torch.bool)
    keep[..., [1, 2]] = True
    plan = plan.edited({"one.weight": keep.view(9, 16)})
    refined = refine(plan, model, batches, steps=20, swaps=partial(Runs, size=4))
    assert bool((refined.keep["one.weight"].view(9, 4, 4).sum(2) == 2).all())
    assert not torch.equal(refined.keep["one.weight"], plan.keep["one.weight"])
    assert kl_of(model, refined, batches) < kl_of(model, plan, batches)


def test_a_vital_weight_comes_back_in_the_first_round() -> None:
    model, batches = trained("multilayer")
    everything = make_plan(random_scores(model), model, sparsity=0.0)
    # of the 63 weights of the second layer, the one whose removal alone hurts most, among others that hurt little
    alone = {}
    for number in range(63):
        keep = torch.ones(63, dtype=torch.bool)
        keep[number] = False
        alone[number] = kl_of(model, everything.edited({"two.weight": keep.view(7, 9)}), batches)
    order = sorted(alone, key=lambda number: alone[number])
    vital, harmless = order[-1], order[:20]
    keep = torch.ones(63, dtype=torch.bool)
    keep[[vital, *harmless]] = False
    plan = everything.edited({"two.weight": keep.view(7, 9)})
    weights = sum(k.numel() for k in plan.keep.values())
    refined = refine(plan, model, batches, rounds=1, learn=False, share=1.01 / weights)
    assert refined.history[1]["ranked"] == "blame"
    assert refined.history[1]["swapped"] == 1
    assert refined.keep["two.weight"].flatten()[vital]
    assert kl_of(model, refined, batches) < 0.5 * kl_of(model, plan, batches)


@pytest.mark.slow
def test_blames_residual_closes_the_account() -> None:
    model, batches = trained("multilayer", torch.float64)
    plan = make_plan(random_scores(model), model, sparsity=0.5)
    residuals = []
    for nodes in (8, 128):
        history = refine(plan, model, batches, rounds=1, learn=False, nodes=nodes).history
        assert history[0]["learn"] > 0.1
        residuals.append(abs(history[1]["residual"]))
    assert residuals[0] < 0.05 * history[0]["learn"]
    assert residuals[1] < residuals[0]


def test_the_divergence_is_the_mean_kl_to_the_dense_model() -> None:
    model, batches = trained("multilayer", torch.float64)
    plan = make_plan(random_scores(model), model, sparsity=0.5)
    facts = refine(plan, model, batches, rounds=0, learn=False).provenance["refine"]
    sizes = facts["samples"]
    assert sizes == {"learn": 72, "accept": 24}
    both = (sizes["learn"] * facts["before"]["learn"] + sizes["accept"] * facts["before"]["accept"]) / 96
    assert both == pytest.approx(kl_of(model, plan, batches), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "channels", "block:2x2"])
def test_the_same_seed_gives_the_same_plan(structure: str) -> None:
    model, batches = trained("residual")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure=structure)
    weights = copy.deepcopy(model.state_dict())
    first, second = (refine(plan, model, batches, rounds=3, steps=8, seed=4) for _ in range(2))
    assert first.digest == second.digest
    other = refine(plan, model, batches, rounds=0, learn=False, seed=5)
    assert other.provenance["refine"]["before"] != first.provenance["refine"]["before"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["unstructured", "channels", "2:4", "block:2x2"])
def test_refining_repairs(structure: str) -> None:
    model, batches = trained("flattened")
    plan = planned(model, structure, 0.5)
    swapped = refine(plan, model, batches, rounds=8, learn=False, share=0.1)
    learnt = refine(plan, model, batches, rounds=0)
    for refined in (swapped, learnt):
        assert kl_of(model, refined, batches) < 0.85 * kl_of(model, plan, batches)


@pytest.mark.parametrize("calls", [60, 200, 500])
def test_ctrl_c_keeps_the_best_so_far(calls: int, tmp_path: Path) -> None:
    model, batches = trained("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    seen = 0

    def target(outputs: Tensor, labels: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == calls:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, labels, reduction="none")[:, None]

    refined = refine(plan, model, batches, target=target, importance="margin")
    facts = refined.provenance["refine"]
    assert seen == calls
    assert facts["ended"] == "interrupted"
    assert facts["after"]["accept"] <= facts["before"]["accept"]
    assert sum(int(k.sum()) for k in refined.keep.values()) == sum(int(k.sum()) for k in plan.keep.values())
    refined.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").digest == refined.digest


def test_a_spent_budget_gives_the_plan_back() -> None:
    model, batches = trained("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    refined = refine(plan, model, batches, budget_seconds=0)
    assert refined.provenance["refine"]["ended"] == "budget"
    assert all(torch.equal(refined.keep[n], k) for n, k in plan.keep.items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "learn"), [("flattened", False), ("multilayer", True)])
def test_the_search_ends_where_rounds_gain_nothing(name: str, learn: bool) -> None:
    model, batches = trained(name)
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    whole = refine(plan, model, batches, patience=None, learn=learn, steps=40)
    short = refine(plan, model, batches, learn=learn, steps=40)
    rounds, kept = len(short.history), sum(int(keep.sum()) for keep in plan.keep.values())
    assert short.provenance["refine"]["ended"] == "patience"
    assert short.history == whole.history[:rounds]
    assert rounds < len(whole.history)
    assert short.provenance["refine"]["after"]["accept"] < 1.1 * whole.provenance["refine"]["after"]["accept"]
    best, counted = short.history[0]["accept"], []
    for entry in short.history[1:]:
        before, best = best, min(best, entry["accept"])
        if entry["stage"] == "refine":
            counted += [] if counted else [before]
            counted += [best] if entry["swapped"] <= 0.02 * kept else []
    gains = [1 - after / start for start, after in zip(counted, counted[6:], strict=False)]
    assert [gain < 0.01 for gain in gains] == [False] * (len(gains) - 1) + [True]


def test_a_saved_plan_keeps_its_history(tmp_path: Path) -> None:
    model, batches = trained("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.6)
    assert plan.history == []
    refined = refine(plan, model, batches, rounds=4, steps=10)
    refined.save(tmp_path / "plan.safetensors")
    back = Plan.load(tmp_path / "plan.safetensors")
    assert not back.provenance.get("edited")
    assert back.history == refined.history
    assert [e["round"] for e in back.history if e["stage"] == "refine"] == [1, 2, 3, 4]
    assert [e["ranked"] for e in back.history if e["stage"] == "refine"] == ["blame", "gain", "blame", "gain"]
    taken = [e["accept"] for e in back.history if e["kept"]]
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] == back.provenance["refine"]["after"]["accept"]
    for name, moved in back.provenance["refine"]["moved"].items():
        before, after = plan.keep[name], back.keep[name]
        assert moved == {"back": int((after & ~before).sum()), "out": int((before & ~after).sum())}


@pytest.mark.slow
def test_a_mask_that_only_fits_what_it_learnt_from_is_told() -> None:
    model, batches = trained("multilayer")
    x, y = batches[0]
    plan = make_plan(random_scores(model), model, sparsity=0.7)
    with pytest.warns(UserWarning, match="fits the 8 samples it learnt from"):
        refined = refine(plan, model, [(x[:30], y[:30])], accept_share=0.73, learn=True)
    assert "more scoring samples" in refined.provenance["refine"]["note"]


@pytest.mark.slow
def test_channels_keep_their_layers_where_that_is_asked_for() -> None:
    model, batches = trained("flattened")
    plan = make_plan(random_scores(model), model, IMAGES, sparsity=0.5, structure="channels")
    anywhere = refine(plan, model, batches, steps=20, share=0.2)
    within = refine(plan, model, batches, steps=20, share=0.2, swaps=partial(Groups, across=False))
    assert all(int(k.sum()) == int(plan.keep[n].sum()) for n, k in within.keep.items())
    assert anywhere.sparsity()["prunable"] >= plan.sparsity()["prunable"]
    assert all(k.any() for k in anywhere.keep.values())


def test_what_cannot_be_refined_is_refused() -> None:
    model, batches = trained("multilayer")
    plan = make_plan(random_scores(model), model, sparsity=0.5)
    with pytest.raises(ArtifactError, match="the plan was made for model"):
        refine(plan, HANDLED["multilayer"](), batches)
    with pytest.raises(UsageError, match="target 'kll' does not exist; did you mean kl"):
        refine(plan, model, batches, target="kll")
    with pytest.raises(UsageError, match="one of each at least; it got 1 and 0"):
        refine(plan, model, [(x[:1], y[:1]) for x, y in batches[:1]])
    with pytest.raises(UsageError, match="share of samples to accept on is 1"):
        refine(plan, model, batches, accept_share=1)
    with pytest.raises(UsageError, match="share is 2; it must be from 0 to 1"):
        refine(plan, model, batches, share=2)
    with pytest.raises(UsageError, match="rounds is -1; it must be from 0 upwards"):
        refine(plan, model, batches, rounds=-1)


def test_labels_need_not_be_classes() -> None:
    model, batches = trained("multilayer")
    regression = [(x, model(x).detach() + 0.1) for x, _ in batches]
    plan = make_plan(random_scores(model), model, sparsity=0.5)
    refined = refine(plan, model, regression, target="loss", loss=F.mse_loss, rounds=4, learn=False)
    before = refined.provenance["refine"]["before"]["accept"]
    assert refined.provenance["refine"]["after"]["accept"] < before
    everything = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in regression])
    sizes = refined.provenance["refine"]["samples"]
    both = (sizes["learn"] * refined.provenance["refine"]["before"]["learn"] + sizes["accept"] * before) / 96
    with torch.no_grad():
        assert both == pytest.approx(float(F.mse_loss(masked(model, plan)(everything[0]), everything[1])), rel=1e-5)
