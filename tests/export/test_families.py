"""From a folder of every family to a smaller one, which transformers loads by itself in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import prunekit
from prunekit import Plan, Trajectory, make_plan, prune, score
from tests.transformer_models import built, first

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers, and of plans that few units cannot meet
WAYS = {
    "bert": ("unstructured", "neurons", "layers"),
    "gpt2": ("unstructured", "neurons", "layers"),
    "llama": ("unstructured", "heads+neurons", "layers"),
    "qwen3": ("unstructured", "heads+neurons", "layers"),
    "mixtral": ("unstructured", "heads+neurons", "layers", "experts"),
    "t5": ("unstructured", "heads+neurons", "layers"),
    "vit": ("unstructured", "neurons", "layers"),
}
"""Family -> what a config can say of it; BERT, GPT-2 and ViT divide their width by the number of heads, so not fewer heads."""
GENERATING = ("gpt2", "llama", "qwen3", "mixtral", "t5")
ALONE = """
import sys, torch
from benchmarks.zoo.operators import declare
declare()
import transformers
found = {}
for asked in sys.argv[1:]:
    folder, kind, generating = asked.split("=")
    inputs = torch.load(folder.partition("-")[0] + ".pt", weights_only=True)
    model = getattr(transformers, kind).from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(**inputs).logits
    found[folder + "-parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
    if generating == "True":
        made = model.generate(inputs["input_ids"][:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert made.shape[1] >= 4, (folder, made.shape)
assert not [name for name in sys.modules if name.startswith("prunekit")]
torch.save(found, "found.pt")
"""


def pruned(model: nn.Module, inputs: dict[str, torch.Tensor], way: str) -> tuple[nn.Module, Plan]:
    """By magnitude, one structure after the other."""
    small, whole = model, None
    for structure in way.split("+"):
        uniform = structure in ("heads", "neurons", "experts")
        scores = score(Trajectory.of(small), small, criterion="magnitude")
        plan = make_plan(scores, small, inputs, sparsity=0.25, structure=structure, uniform=uniform)
        small, whole = prune(small, plan, inputs), plan if whole is None else whole.then(plan)
    assert whole is not None
    return small, whole


@pytest.mark.exhaustive
def test_what_was_pruned_and_exported_is_loaded_by_transformers_alone(tmp_path: Path) -> None:
    asked, expected = [], {}
    for family, ways in WAYS.items():
        made, inputs = built(family)
        if family == "t5":
            made.config.decoder_start_token_id = made.generation_config.decoder_start_token_id = 0
        made.save_pretrained(tmp_path / family)
        dense = prunekit.load_hf(tmp_path / family)
        torch.save(inputs, tmp_path / f"{family}.pt")
        for way in ways:
            small, plan = pruned(dense, inputs, way)
            name = f"{family}-{way}"
            record = prunekit.export(small, "hf", tmp_path / name, inputs, plan=plan)
            assert record.loads_with == f"transformers.{type(dense).__name__}.from_pretrained", (name, record.notes)
            fewer, all_ = (sum(p.numel() for p in model.parameters()) for model in (small, dense))
            assert (fewer < all_) == (way != "unstructured"), name
            asked.append(f"{name}={type(dense).__name__}={family in GENERATING}")
            expected[name] = first(small, inputs), fewer
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, (answer, parameters) in expected.items():
        torch.testing.assert_close(found[name], answer, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
        assert int(found[f"{name}-parameters"]) == parameters
