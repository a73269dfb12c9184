"""Families of transformers: heads, neurons, experts and blocks are as many as the config says, and leave exactly."""

from __future__ import annotations

import pytest
import torch

from prunekit import Trajectory, make_plan, masked, prune, score
from prunekit.structure import find_groups
from tests.structure_models import random_scores
from tests.transformer_models import FAMILIES, HEADS, LAYERS, NEURONS, built, first

pytestmark = pytest.mark.filterwarnings("ignore:asked for")  # units are few
UNITS = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "phi": 2, "mixtral": 2}
"""Key-value heads, which leave with their queries, where they are fewer than the heads."""
STACKS = {"t5": 2, "whisper": 2, "clip": 2}
"""Stacks of blocks, where there is more than one."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_as_many_as_the_config_says_and_leave_exactly(family: str) -> None:
    model, inputs = built(family)
    stacks = STACKS.get(family, 1)
    whole = LAYERS * stacks - (2 if family == "t5" else 0)  # T5's first blocks hold the bias of all
    attentions = {"t5": 3, "whisper": 3 * LAYERS}.get(family, LAYERS * stacks)
    expected = {"heads": [UNITS.get(family, HEADS)] * attentions, "neurons": [NEURONS] * LAYERS * stacks, "layers": [1] * whole}
    if family == "mixtral":
        expected["experts"] = [4] * LAYERS
    for structure, sizes in expected.items():
        groups = find_groups(structure, model, inputs)
        assert [group.size for group in groups] == sizes, structure
        scores = random_scores(model)
        plan = make_plan(scores, model, inputs, sparsity=0.3, structure=structure, uniform=structure != "layers")
        small = prune(model, plan, inputs)
        torch.testing.assert_close(first(small, inputs), first(masked(model, plan), inputs), atol=1e-5, rtol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        if structure != "layers":
            assert len({int(keep.sum()) for keep in plan.keep.values()}) == 1


def test_experts_that_are_left_share_what_the_router_gave_to_those_that_are_gone() -> None:
    """Against a model that was built with fewer experts, which is given the rows that stay."""
    model, inputs = built("mixtral")
    scores = score(Trajectory.of(model), model, criterion="magnitude")
    plan = make_plan(scores, model, inputs, sparsity=0.25, structure="experts", uniform=True)
    import transformers

    config = {**FAMILIES["mixtral"][2], "num_local_experts": int(next(iter(plan.keep.values())).sum())}
    fewer = transformers.MixtralForCausalLM(transformers.MixtralConfig(**config)).eval()
    kept = plan.kept_indices()
    state = {name: t[kept[f"{name}@0"]] if f"{name}@0" in kept else t for name, t in model.state_dict().items()}
    fewer.load_state_dict(state)
    torch.testing.assert_close(first(prune(model, plan, inputs), inputs), first(fewer, inputs))


def test_a_norm_over_the_width_refuses_it_by_name() -> None:
    for family, name, why in (("llama", "model.norm", "a mean over them"), ("gpt2", "transformer.ln_f", "is a LayerNorm")):
        model, inputs = built(family)
        assert any(name in reason and why in reason for reason in find_groups("channels", model, inputs).refused.values())
