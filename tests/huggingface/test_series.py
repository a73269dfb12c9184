"""Folders as states of one model: a base and what was tuned from it, and LoRA adapters; each state is a whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit import Run
from prunekit.errors import PrunekitError
from prunekit.huggingface import Series, load_model, with_base
from prunekit.kernel import ModelFunction
from prunekit.kernel.reconstruction import reconstruct
from tests.cli.conftest import Cli
from tests.huggingface.conftest import MODELS, Save, transformers
from tests.huggingface.test_import import done
from tests.huggingface.test_loading import IDS, answer

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn", "mlp.c_fc"], "llama": ["q_proj", "down_proj"]}
AUTO = "AutoModelForSequenceClassification"
Adapt = Callable[..., Path]


@pytest.fixture
def adapt(tmp_path: Path) -> Adapt:
    """``adapt(base, "name", kind, **of LoraConfig)`` -> a folder as peft writes it, and peft's merged model."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'prunekit[test]'")

    def adapted(base: Path, name: str, kind: str, auto: str | None = None, seed: int = 1, **options: Any) -> Path:
        torch.manual_seed(seed)
        library = getattr(transformers, auto) if auto else None
        model = load_model(base) if library is None else library.from_pretrained(base)
        model.name_or_path = str(base)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS[kind], **options}))
        for tensor_name, parameter in wrapped.named_parameters():
            if "lora_" in tensor_name or "modules_to_save" in tensor_name:
                torch.nn.init.normal_(parameter, std=0.3)
        place = tmp_path / name
        wrapped.save_pretrained(place)
        wrapped.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
        return place

    return adapted


def merged(base: Path, adapter: Path, auto: str | None = None) -> dict[str, torch.Tensor]:
    return Series([base, adapter], auto).read(adapter)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"use_rslora": True, "lora_alpha": 3}),
        ("bert", {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"layer.0.attention.self.value": 5}}),
        ("gpt2", {}),
        ("llama", {"modules_to_save": ["norm"], "target_modules": ["q_proj", "down_proj"]}),
    ],
    ids=["rslora", "patterns", "Conv1D", "whole modules"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merged_as_peft_merges(kind: str, options: dict[str, Any], save: Save, adapt: Adapt) -> None:
    base = save(kind)
    adapter = adapt(base, "adapter", kind, **options)
    found, theirs = merged(base, adapter), load_model(Path(f"{adapter}-merged")).state_dict()
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    before = load_model(base).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in found.items())


def test_a_bfloat16_base_is_rounded_once(save: Save, adapt: Adapt) -> None:
    """W + s B A in float64, rounded to the base's type, by the definition of LoRA."""
    base = save("llama", dtype=torch.bfloat16)
    adapter = adapt(base, "adapter", "llama", lora_alpha=6)
    found, given = merged(base, adapter), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (given[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = load_model(base).state_dict()[f"{name}.weight"].double() + 6 / 4 * b @ a
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(found[f"{name}.weight"].double(), exact, rtol=2**-8, atol=1e-4)


def imported(cli: Cli, *arguments: object) -> str:
    """What import says, its notes included."""
    found = cli("import", *arguments)
    assert found.code == 0, found.err
    return found.out + found.err


def check_complete(run: Run, first: torch.nn.Module, last: torch.nn.Module) -> None:
    """f(θ_0) and f(θ_N) are what those two models answer, and f(θ_0) + Σ = f(θ_N)."""
    path, labels = run.trajectory, torch.zeros(3, dtype=torch.long)
    function = ModelFunction(
        run.model, path.layout, path.fixed, lambda outputs, labels: outputs.flatten(1), torch.device("cpu"), task=run.task
    )
    found = reconstruct(function, path.segments(), {"input_ids": IDS}, labels, tolerance=1e-4)
    for model, outputs in ((first, found.start), (last, found.model), (last, found.rebuilt)):
        expected = answer(model).reshape(outputs.shape)
        torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=2e-3 if outputs is found.rebuilt else 1e-5)
    assert not torch.allclose(found.start, found.model, atol=1e-2)


@pytest.mark.slow
def test_from_a_base_model_to_what_was_tuned_from_it(save: Save, words: str, cli: Cli, tmp_path: Path) -> None:
    base, tuned, run = save("base"), save("bert", seed=3), tmp_path / "run"
    out = imported(cli, "--hf", base, "--hf", tuned, "--data", f"{words}:classes", "--out", run)
    assert "lacks classifier.bias (and 1 more): the head is taken as it is at the end, does not move" in out
    opened = Run(run)
    assert opened.recipe.prunable.ignore == ["classifier.*"]
    first = load_model(tuned)
    first.bert.load_state_dict(load_model(base).state_dict())  # type: ignore[union-attr,operator]
    check_complete(opened, first, load_model(tuned))
    done(cli, "score", run, "--criterion", "influence")
    done(cli, "prune", run, "--criterion", "influence", "--structure", "channels", "--sparsity", "0.2", "--name", "small")
    shape = load_file(run / "pruned" / "small" / "model.safetensors")["classifier.weight"].shape
    assert shape == (3, 32)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_of_an_adapter_are_a_path_from_its_base(
    save: Save, adapt: Adapt, words: str, cli: Cli, tmp_path: Path
) -> None:
    base, run, alone = save("llama"), tmp_path / "run", tmp_path / "named"
    first, last = (adapt(base, f"out/checkpoint-{step}", "llama", seed=step) for step in (9, 20))
    shutil.rmtree(tmp_path / "out" / "checkpoint-9-merged")
    (tmp_path / "out" / "checkpoint-20-merged").rename(tmp_path / "merged")
    out = imported(cli, "--hf", tmp_path / "out", "--data", f"{words}:texts", "--out", run)
    assert "a path of 3 checkpoints, task causal_lm" in out
    assert "the adapters move 4 tensors (model.layers.0.mlp.down_proj.weight first)" in out
    done(cli, "import", "--hf", base, "--hf", first, "--hf", last, "--data", f"{words}:texts", "--out", alone)
    opened = Run(run)
    assert opened.trajectory.hash == Run(alone).trajectory.hash
    assert opened.recipe.model.pretrained == str(base)
    moved = {
        e.name
        for e in opened.trajectory.layout
        if opened.trajectory.state(0)[e.span].ne(opened.trajectory.state(-1)[e.span]).any()
    }
    assert len(moved) == 4
    check_complete(opened, load_model(base), load_model(tmp_path / "merged"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_the_adapter_brings(save: Save, adapt: Adapt, cli: Cli, tmp_path: Path) -> None:
    base = save("base", config={"num_labels": 3})
    adapter = adapt(base, "adapter", "bert", AUTO, task_type="SEQ_CLS")
    assert "the head is taken as it is at the end" in imported(cli, "--hf", adapter, "--out", tmp_path / "run")
    opened, whole = Run(tmp_path / "run"), load_model(Path(f"{adapter}-merged"))
    assert opened.recipe.model.auto == AUTO
    torch.testing.assert_close(answer(opened.model), answer(whole), rtol=0, atol=1e-6)
    (base / "config.json").write_text(
        json.dumps({**json.loads((base / "config.json").read_text()), "id2label": {"0": "a", "1": "b"}})
    )
    with pytest.raises(PrunekitError, match=r"classifier\.\w+ has shape \(3.* by the base's config\.json it is \(2.*num_labels"):
        merged(base, adapter, AUTO)


def said(**values: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        place = adapter / "adapter_config.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), **values}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        state = load_file(adapter / "adapter_model.safetensors")
        change(state)
        save_file(state, adapter / "adapter_model.safetensors")

    return changed


A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another type": (said(peft_type="IA3"), "peft_type is 'IA3', and prunekit merges LORA alone; merge it with peft"),
    "DoRA": (said(use_dora=True), "use_dora is True, which is not plain LoRA"),
    "biases": (said(bias="all"), "bias is 'all', and prunekit merges adapters without biases"),
    "layers twice": (said(layer_replication=[[0, 2]]), r"layer_replication is \[\[0, 2\]\], which is not plain LoRA"),
    "aLoRA": (said(alora_invocation_tokens=[1]), "alora_invocation_tokens is"),
    "a kind to come": (said(use_newlora=True), "use_newlora is True, which is not plain LoRA"),
    "PiSSA": (said(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changed the base model's weights"),
    "an expression": (said(alpha_pattern={"(a+)+": 1}), r"alpha_pattern .* '\(a\+\)\+' is a regular expression"),
    "no alpha": (said(lora_alpha=0), "lora_alpha is 0, which must be a number above 0"),
    "no tensors": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
    "half a pair": (tensors(lambda state: state.pop(A)), "of bert.encoder.layer.0.attention.self.query it has lora_B"),
    "other shapes": (tensors(lambda state: state.update({A: torch.zeros(4, 31)})), r"A \(4, 31\) and B \(32, 4\) do not make"),
    "another model": (tensors(lambda s: s.update({A.replace("query", "quest"): s.pop(A)})), "is for .*quest.weight, which Bert"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A BERT classifier's folder and an adapter of it."""
    peft, place = pytest.importorskip("peft"), tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    kind, settings, options = MODELS["bert"]
    model = getattr(transformers, kind)(getattr(transformers, settings)(**options))
    model.save_pretrained(place / "base")
    model.name_or_path = str(place / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS["bert"])).save_pretrained(place / "adapter")
    return place / "base", place / "adapter"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(case: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    change, message = REFUSED[case]
    base, given = plain
    adapter = Path(shutil.copytree(given, tmp_path / "adapter"))
    change(adapter)
    with pytest.raises(PrunekitError, match=message) as refused:
        merged(base, adapter)
    assert "\n" not in str(refused.value)


def test_tied_weights_are_not_adapted(save: Save, adapt: Adapt) -> None:
    base = save("gpt2")
    adapter = adapt(base, "adapter", "gpt2", target_modules=["wte"])
    with pytest.raises(PrunekitError, match=r"transformer\.wte\.weight is tied to lm_head\.weight in the base model"):
        merged(base, adapter)


def test_folders_that_are_not_of_one_model(plain: tuple[Path, Path], save: Save) -> None:
    base, adapter = plain
    with pytest.raises(PrunekitError, match="a whole model after the adapter"):
        Series([adapter, base])
    with pytest.raises(PrunekitError, match="goes with one model, and 2 are named"):
        Series([base, base, adapter])
    for first, message in (
        (save("llama"), "model_type is llama, in .* it is bert; a path is of one model"),
        (save("base", "deep", config={"num_hidden_layers": 3}), r"has encoder\.layer\.2\.\S+ \(and \d+ more\), for which Bert"),
        (
            save("base", "flat", config={"num_hidden_layers": 1}),
            r"lacks bert\.encoder\.layer\.1\.\S+, which is no part of the head",
        ),
        (save("base", "wide", config={"vocab_size": 70}), r"has in another shape \(70, 32\), not \(64, 32\), bert\.embeddings"),
    ):
        with pytest.raises(PrunekitError, match=message):
            Series([first, base]).look()


def test_what_two_configs_say_differently_is_noted(plain: tuple[Path, Path], save: Save) -> None:
    series = Series([save("base", config={"hidden_act": "relu", "hidden_dropout_prob": 0.3}), plain[0]])
    series.look()
    (first, second) = series.notes
    assert "hidden_act is 'relu', taken as 'gelu', as in" in first
    assert "lacks classifier.bias" in second


def test_an_adapter_whose_base_is_not_here(plain: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(plain[1], tmp_path / "adapter"))
    said(base_model_name_or_path="some/model")(adapter)
    with pytest.raises(PrunekitError, match=r"an adapter of 'some/model', which is no folder here .*--hf BASE --hf"):
        with_base([adapter])
