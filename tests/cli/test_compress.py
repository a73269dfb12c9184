"""compress: from a Hugging Face folder to a smaller one; gone on with by single verbs, foreseen, refused, cut off."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunekit
from benchmarks.zoo.operators import declare
from prunekit import durable
from prunekit.cli import main
from prunekit.exporting.placing import taking_place
from prunekit.measure import timed
from prunekit.measure.latency import FEWEST
from prunekit.verbs import evaluating, reporting
from prunekit.verbs.pruning import prune_run
from tests.cli.conftest import Cli
from tests.pictures import undrawn

declare()
transformers = pytest.importorskip("transformers")
ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip
DATA = "data_of_compress_tests"
SIZES = {"train": 32, "validation": 16, "test": 16, "scoring": 8}


def splits(labels: Any) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for seed, (name, size) in enumerate(SIZES.items()):
        ids = torch.randint(4, 40, (size, 6), generator=torch.Generator().manual_seed(seed))
        found[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two tiny models, a classifier and a language model, whose data a module gives; ``eval`` times few passes."""
    folder, patch = tmp_path_factory.mktemp("compress"), pytest.MonkeyPatch()
    patch.setattr(evaluating, "timed", partial(timed, most=FEWEST))
    torch.manual_seed(0)
    bert = transformers.BertConfig(**ENCODER, num_labels=3)
    transformers.BertForSequenceClassification(bert).save_pretrained(folder / "bert")
    llama = transformers.LlamaConfig(**ENCODER, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    (folder / "llama" / "tokenizer_config.json").write_text("{}")
    module = ModuleType(DATA)
    module.classes = lambda: splits(lambda ids: ids[:, 0] % 3)  # type: ignore[attr-defined]
    module.texts = lambda: splits(lambda ids: ids)  # type: ignore[attr-defined]
    patch.setitem(sys.modules, DATA, module)
    yield folder
    patch.undo()


def asked(place: Path, out: Path, *more: object) -> list[object]:
    return ["compress", place / "llama", "--data", f"{DATA}:texts", "--out", out, "--structure", "layers", *more]


def done(*words: object) -> None:
    argv, sys.argv = sys.argv, ["prunekit", *map(str, words), "--quiet"]
    try:
        with undrawn(), pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    assert stop.value.code in (0, None)


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """The language model with one of two layers."""
    done(*asked(place, place / "small", "-s", "0.5", "--allocation", "global", "--no-refine"))
    return place / "small"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small, tmp_path / "small")
    return tmp_path / "small"


ANSWER = """
import json, sys
sys.path.insert(0, {root!r})
from benchmarks.zoo.operators import declare
declare()
import torch, transformers
found = {{}}
for folder, kind in {models!r}:
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    ids = torch.tensor({ids!r})
    with torch.no_grad():
        found[kind] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()
    if model.can_generate():
        found["generated"] = model.generate(ids, max_new_tokens=3, do_sample=False).shape[1]
assert "prunekit" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.exhaustive  # transformers is imported anew
def test_what_comes_out_loads_without_prunekit_and_answers_as_the_pruned_model(place: Path, small: Path) -> None:
    done("compress", place / "bert", "--data", f"{DATA}:classes", "-s", "0.5", "--allocation", "global", "--no-refine",
         "--out", place / "masked")  # fmt: skip
    ids = splits(lambda ids: ids)["test"]["input_ids"][:3]
    models = [(str(small), "LlamaForCausalLM"), (str(place / "masked"), "BertForSequenceClassification")]
    root = str(Path(__file__).parents[2])
    told = subprocess.run(
        [sys.executable, "-c", ANSWER.format(root=root, models=models, ids=ids.tolist())],
        capture_output=True,
        text=True,
        cwd=place,
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["generated"] == ids.shape[1] + 3
    for folder, kind in models:
        run = prunekit.Run(Path(folder) / "prunekit")
        (pruned,) = (run.path / "pruned").glob("[!.]*")
        model = prunekit.load(pruned, run.new_model)
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(torch.tensor(found[kind]), expected, atol=1e-5, rtol=1e-5)
    dense, less = (transformers.LlamaForCausalLM.from_pretrained(folder) for folder in (place / "llama", small))
    assert less.num_parameters() < dense.num_parameters()
    assert (small / "tokenizer_config.json").is_file()


@pytest.mark.slow  # a whole run
def test_the_last_lines_are_the_verdict_and_how_it_loads_and_a_second_call_reuses_all(place: Path, small: Path, cli: Cli) -> None:
    again = cli(*asked(place, small, "--allocation", "global", "-s", "0.5", "--no-refine"))
    assert again.code == 0, again.err
    *_, verdict, loads = again.out.strip().splitlines()
    assert "parameters stay; validation perplexity" in verdict
    assert "transformers.LlamaForCausalLM.from_pretrained" in loads
    assert "unchanged, reused" in loads
    assert len(again.out.splitlines()) < 12


@pytest.mark.slow  # three verbs
def test_single_verbs_go_on_with_its_run_and_export_leaves_the_run_where_it_is(copy: Path, place: Path, cli: Cli) -> None:
    run = copy / "prunekit"
    assert cli("eval", run / "pruned" / "layers-0.5").code == 0
    assert cli("prune", run, "-c", "magnitude", "-s", "0.3", "--name", "other").code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "use --overwrite" in cli("export", run / "pruned" / "other", "--to", "hf", copy).err
    exported = cli("export", run / "pruned" / "other", "--to", "hf", copy, "--overwrite")
    assert exported.code == 0, exported.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert json.loads((copy / "config.json").read_text())["num_hidden_layers"] == 2
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


@pytest.mark.slow  # seven verbs
def test_what_is_foreseen_is_what_the_single_commands_do_and_nothing_is_written(
    place: Path, small: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "new"
    told = cli(*asked(place, out, "-s", "0.5", "--allocation", "global", "--no-refine", "--dry-run", "--json"))
    assert told.code == 0, told.err
    assert not out.exists()
    found = json.loads(told.out)
    assert {*found["commands"]} == {*found["seconds"]}
    dense = transformers.LlamaForCausalLM.from_pretrained(place / "llama")
    assert found["parameters"] == dense.num_parameters()
    assert found["whole"]["parameters"] == sum(dict(dense.named_parameters())[n].numel() for n in found["whole"]["names"])
    assert found["memory"]["models"] >= 2 * 4 * dense.num_parameters()
    for command in found["commands"].values():
        assert cli(*shlex.split(command)[1:], "--quiet").code == 0, command
    (name,) = [path.name for path in (out / "prunekit" / "pruned").iterdir()]
    for file in ("model.safetensors", "prunekit/compare.csv", f"prunekit/pruned/{name}/plan.safetensors"):
        assert (out / file).read_bytes() == (small / file).read_bytes(), file


@pytest.mark.slow  # seven verbs
def test_a_mask_learnt_then_weights_in_one_command(place: Path, tmp_path: Path, cli: Cli) -> None:
    """What tokens are spent on is said, counted in what is foreseen, and refused where they are too few, before all else."""
    out = tmp_path / "learnt"
    plain = ["compress", place / "llama", "--data", f"{DATA}:texts", "--out", out, "-s", 0.5]
    learnt = [*plain, "--refine-tokens", 480, "--tune-tokens", 384]
    shares = [json.loads(cli(*words, "--dry-run", "--json").out) for words in ([*plain, "--no-refine"], learnt)]
    assert shares[1]["seconds"]["prune"] > shares[0]["seconds"]["prune"]
    assert "--refine-tokens 480 --tune-tokens 384" in shares[1]["commands"]["prune"]
    assert shares[1]["at_most"] == []
    for more, said in (
        (("--refine-tokens", 9), "refine: tokens is 9"),
        (("--tune-tokens", 9), "finetune: tokens is 9"),
        (("--tokens", 99), "too few to try what to spend them on"),
        (("--tokens", "9k", "--layerwise", "admm"), "leave --tokens out"),
        (("--layerwise", "admm", "--offload", "--tune-tokens", 384), "--offload never has it"),
    ):
        refused = cli(*plain, *more)
        assert refused.code == 2
        assert said in refused.err
        assert not out.exists()
    done = cli(*learnt)
    assert done.code == 0, done.err
    assert "a mask learnt from 480 tokens, then weights tuned on 384 tokens" in done.out
    assert (out / "prunekit" / "pruned" / "unstructured-0.5" / "trajectory").is_dir()
    assert "then weights tuned on 384 tokens" in cli(*learnt).out  # reused
    disk = [found["disk"]["run"] for found in shares]
    assert disk[1] - disk[0] == 4 * shares[0]["parameters"] * (2 + 384 // (6 * 32))


@pytest.mark.slow  # seven verbs
def test_kept_weights_make_up_for_removed_ones_in_one_command(place: Path, tmp_path: Path, cli: Cli) -> None:
    """The model is the one that ``prune --compensate`` writes; it is foreseen, and refused where a method gives new weights."""
    out = tmp_path / "refitted"
    plain = ["compress", place / "llama", "--data", f"{DATA}:texts", "--out", out, "--structure", "neurons", "-s", 0.5]
    unfit = [*plain, "-c", "kfac", "--no-refine", "--compensate"]
    asked = [*unfit[:-1], "--ignore", "*embed*", "--ignore", "*head*", "--compensate"]
    for words, code, said in (
        ([*plain, "--layerwise", "admm", "--compensate"], 2, "compensate"),
        (unfit, 1, "cannot score model.embed_tokens.weight"),
        ([*unfit, "--dry-run"], 1, "(import and compress --ignore"),
    ):
        refused = cli(*words)
        assert refused.code == code
        assert said in refused.err
        assert not out.exists()
    foreseen = [json.loads(cli(*words, "--dry-run", "--json").out) for words in (asked[:-1], asked)]
    assert foreseen[1]["seconds"]["prune"] > foreseen[0]["seconds"]["prune"]
    done = cli(*asked)
    assert done.code == 0, done.err
    assert ": kfac, global, compensated (of kfac)" in done.out
    run = out / "prunekit"
    alone = shlex.split(foreseen[1]["commands"]["prune"])
    assert "--compensate" in alone
    again = cli(*alone[1:-1], "alone")
    assert again.code == 0, again.err
    (pruned,) = (path for path in (run / "pruned").iterdir() if path.name != "alone")
    one, other = (load_file(path / "model.safetensors") for path in (pruned, run / "pruned" / "alone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "reused" in cli(*asked).out


@pytest.mark.slow  # seven verbs
def test_a_classifier_is_trained_on_at_a_rate_that_is_found(
    place: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows how it was trained: the rate is searched for by its loss, shares of its epochs are refused, and so is a disk
    that the states would fill."""
    out = tmp_path / "trained"
    asked = [
        "compress",
        place / "bert",
        "--data",
        f"{DATA}:classes",
        "--out",
        out,
        "-s",
        0.5,
        "--structure",
        "neurons",
        "--no-refine",
    ]
    for more, said in (
        (("--finetune", 0.5), "which of an imported model nobody knows"),
        (("--lr", 0.1), "--lr is about fine-tuning"),
        (("--finetune", 2, "--lora", 999), "no weight has so many inputs and outputs"),
        (("--finetune", 2, "--tune-tokens", 99), "leave --finetune out"),
    ):
        refused = cli(*asked, *more)
        assert refused.code == 2
        assert said in refused.err
        assert not out.exists()
    shares = [
        json.loads(cli(*asked, *more, "--dry-run", "--json").out)
        for more in ((), ("--finetune", 4), ("--finetune", 4, "--record-every", 2))
    ]
    states = [(found["disk"]["run"] - shares[0]["disk"]["run"]) / (4 * found["parameters"]) for found in shares]
    assert states == [0, 2 + 4, 2 + 2]
    assert shares[1]["seconds"]["prune"] > shares[0]["seconds"]["prune"]
    done = cli(*asked, "--finetune", 4, "--record-every", 2)
    assert done.code == 0, done.err
    assert "weights trained for 4 epochs, from rate" in done.out
    run = out / "prunekit"
    (pruned,) = (run / "pruned").iterdir()
    kernel = json.loads((pruned / "eval.json").read_text())["kernel"]
    assert kernel["pruned"]["steps"] == {"dense": 0, "finetuning": 4}
    assert kernel["dense"]["max_error"] == kernel["dense"]["certificate"]["total"] == 0
    assert 0 <= kernel["pruned"]["mean_error"] < 0.01 * kernel["pruned"]["mean_output"]
    assert kernel["pruned"]["finetuning"]["mean_change"] > 0
    assert "Nothing is known of the dense model" in (run / "report.html").read_text()
    again = ["prune", run, "-c", "magnitude", "-s", 0.5, "--no-refine", "--name", "again", "--finetune", 16]
    usage = shutil.disk_usage(run)

    def full(path: Path) -> Any:
        return usage._replace(free=16 * 4 * shares[0]["parameters"])

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        refused = cli(*again)
        assert refused.code == 1
        assert "give --record-every 4, which keeps a state every so many" in refused.err
        assert not (run / "pruned" / "again").exists()
    told = cli(*again, "--lr", 0.01)
    assert told.code == 0, told.err
    assert "from rate" not in told.out
    with monkeypatch.context() as patch:  # what is there takes no more room
        patch.setattr(shutil, "disk_usage", full)
        assert "reused" in cli(*again, "--lr", 0.01).out


@pytest.mark.slow  # seven verbs
def test_ctrl_c_ends_all_verbs_and_the_next_call_goes_on(
    place: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search takes Ctrl-C for its own end; what it has found by then is not passed on as what was asked for."""
    out = tmp_path / "ended"
    asked = ["compress", place / "bert", "--data", f"{DATA}:classes", "--out", out, "-s", 0.5, "--no-refine"]

    def interrupted(*given: Any, **options: Any) -> dict[str, Any]:
        return {**prune_run(*given, **options), "refine": {"ended": "interrupted"}}

    with monkeypatch.context() as patch:
        patch.setattr(reporting, "prune_run", interrupted)
        assert cli(*asked).code == 130
    assert not list((out / "prunekit" / "pruned").iterdir())
    assert not (out / "config.json").exists()
    assert cli(*asked).code == 0


@pytest.mark.slow  # three verbs
def test_tokens_go_with_how_weights_are_trained(place: Path, tmp_path: Path, cli: Cli) -> None:
    """A budget of tokens says how long is trained, of a model whose own training nobody knows too."""
    run = tmp_path / "run"
    for words in (
        ("import", "--hf", place / "llama", "--data", f"{DATA}:texts", "--out", run),
        ("score", run, "-c", "magnitude"),
        ("prune", run, "-c", "magnitude", "-s", 0.5, "--tokens", "24k", "--lr", 0.001, "--record-every", 4, "--name", "both"),
    ):
        done = cli(*words)
        assert done.code == 0, done.err
    assert "not tried" not in done.out
    by_lora = cli("prune", run, "-c", "magnitude", "-s", 0.5, "--tokens", "24k", "--lora", 2, "--name", "lora")
    assert by_lora.code == 0, by_lora.err
    assert "; together not tried, lora says how weights are trained alone" in by_lora.out


@pytest.mark.slow  # stands on a whole run
def test_what_would_be_lost_or_is_something_else_is_refused_before_anything_is_written(place: Path, copy: Path, cli: Cli) -> None:
    def refused(out: Path, *more: object) -> str:
        found = cli(*asked(place, out, *(more or ("-s", "0.5"))))
        assert found.code in (1, 2)
        assert found.err.count("\n") == 1
        return found.err

    assert "is the model's folder" in refused(place / "llama")
    assert "lies in the model's folder" in refused(place / "llama" / "small")
    assert "holds the model's folder" in refused(place)
    other = refused(copy, "-s", "0.4", "--allocation", "global", "--no-refine")
    assert "made by another compress (compare.sparsities.0 was 0.5, is now 0.4)" in other
    (copy / "mine").write_text("notes")
    assert "holds mine" in refused(copy, "-s", "0.5", "--overwrite")
    (copy / "mine").unlink()
    shutil.rmtree(copy / "prunekit")
    assert "no run of compress" in refused(copy)
    (copy / "prunekit").mkdir()
    (copy / "prunekit" / "thesis").write_text("mine")
    assert "holds prunekit/thesis" in refused(copy, "--overwrite", "-s", "0.5")
    new = copy.parent / "new"
    assert "needs --data" in cli("compress", place / "bert", "--out", new).err
    assert "no such folder" in cli("compress", place / "nowhere", "--data", f"{DATA}:classes", "--out", new).err
    assert "--criterion influence needs a path" in refused(new, "-s", "0.5", "--criterion", "rank(influence)+rank(magnitude)")
    assert "--structure 1:0" in refused(new, "--structure", "1:0") or not new.exists()
    for more in (("--structure", "layers"), ("--structure", "unstructured"), ("--structure", "channels", "--dry-run")):
        assert "max_params is 10; the smallest plan that could be made of" in refused(new, "--max-params", 10, *more)
    assert "masks make nothing smaller" in refused(new, "--max-bytes", 10, "--structure", "unstructured")
    assert "nothing is left to prune: prunable.ignore ('*') covers every layer's weight" in refused(
        new, "-s", 0.5, "--ignore", "*"
    )
    assert "2:4 removes 0.5: leave it out" in refused(new, "-s", 0.6, "--structure", "2:4")
    assert not new.exists()


@pytest.mark.slow  # a whole run
def test_where_no_config_says_the_shapes_it_says_load_hf(place: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "heads"
    asked = ["compress", place / "bert", "--data", f"{DATA}:classes", "-s", "0.4", "--no-refine", "--allocation", "uniform",
             "--out", out]  # fmt: skip
    heads, neurons = (cli(*asked, "--structure", structure, "--dry-run").out for structure in ("heads", "neurons"))
    assert "prunekit.load_hf would load it" in heads
    assert "load_hf" not in neurons
    found = cli(*asked, "--structure", "heads")
    assert found.code == 0, found.err
    assert found.out.strip().splitlines()[-1].endswith(f"prunekit.load_hf({str(out)!r})")
    assert prunekit.load_hf(out)(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 3)


@pytest.mark.parametrize("fails", range(1, 30))
def test_cut_off_at_any_moment_the_folder_has_the_old_model_none_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """config.json is what a reader goes by: where it is, all that belongs to it is."""
    folder = tmp_path / "small"
    (folder / "prunekit").mkdir(parents=True)
    (folder / "prunekit" / "recipe.yaml").write_text("a run")
    for name in ("config.json", "model.safetensors", "index"):
        (folder / name).write_text("old")

    def full(what: str, path: Path) -> None:
        nonlocal fails
        fails -= 1
        if fails == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "on_operation", full)
    try:
        with taking_place(folder, ["config.json", "model.safetensors", "index"]) as new:
            (new / "config.json").write_text("new")
            (new / "model.safetensors").write_text("new")
    except prunekit.ArtifactError:
        pass

    def state() -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}

    old, new_ = (
        {"config.json": "old", "model.safetensors": "old", "index": "old"},
        {"config.json": "new", "model.safetensors": "new"},
    )
    now = state()
    assert now in (old, new_) or "config.json" not in now
    monkeypatch.undo()
    durable.recover(folder, depth=1)
    assert state() in (old, new_)
    assert (folder / "prunekit" / "recipe.yaml").read_text() == "a run"


def forms(data: dict[str, torch.Tensor]) -> dict[str, Any]:
    rows = [{key: value[i] for key, value in data.items()} for i in range(len(data["labels"]))]
    return {
        "batches": [{key: value[i : i + 8] for key, value in data.items()} for i in range(0, len(rows), 8)],
        "a data set": Rows(rows),
        "a loader": torch.utils.data.DataLoader(Rows(rows), batch_size=8),
    }


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@pytest.mark.slow  # four models are compressed
def test_in_python_data_come_in_any_form_and_a_model_of_transformers_is_saved_as_a_folder(place: Path, tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(place / "bert").eval()
    data = splits(lambda ids: ids[:, 0] % 3)["train"]
    made = {name: prunekit.compress(model, form, sparsity=0.5, refine_seconds=0) for name, form in forms(data).items()}
    first = made["batches"]
    for name, other in made.items():
        assert other.plan.digest == first.plan.digest, name
        assert other.report["dense"] == first.report["dense"], name
    first.save(tmp_path / "small")
    first.save(tmp_path / "small")
    back = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        one, two = (each(input_ids=data["input_ids"]).logits for each in (back, first.model))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert "test samples" in (tmp_path / "small" / "README.md").read_text()
    plain = prunekit.compress(torch.nn.Linear(6, 3), [(torch.randn(32, 6), data["labels"])], sparsity=0.5, refine_seconds=0)
    plain.save(tmp_path / "plain")
    assert prunekit.load(tmp_path / "plain", lambda: torch.nn.Linear(6, 3)).weight.eq(0).any()
