"""``eval --lm-eval``: both models in the lm-evaluation-harness, on a task made here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from prunekit import Run
from prunekit.verbs import harness
from prunekit.verbs.pruned_folder import open_pruned
from tests.cli.conftest import Cli
from tests.huggingface.conftest import Save
from tests.huggingface.test_import import done

TASK = """
task: first_letters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: text
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc}]
metadata: {version: 2}
"""
DOCUMENTS = [{"text": f"a{c}", "choices": ["b", "cd"], "right": n % 2} for n, c in enumerate("abcdefghijkl")]


def tokenizer(folder: Path) -> None:
    """Bytes of the letters alone, each a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(97 + n): n + 3 for n in range(26)}}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(folder)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'prunekit[lm-eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    (folder / "first.yaml").write_text(TASK.replace("DATA", str(folder / "documents.jsonl")))
    return folder


def accuracy(model: torch.nn.Module) -> float:
    """By the definition of multiple choice: the choice of the largest log-probability after the text."""
    right = 0
    for each in DOCUMENTS:
        sums = []
        for choice in each["choices"]:
            ids = [ord(c) - 97 + 3 for c in f"{each['text']}{choice}"]
            with torch.no_grad():
                told = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(str(each["text"]))
            sums.append(sum(float(told[at - 1, ids[at]]) for at in range(start, len(ids))))
        right += int(sums[1] > sums[0]) == each["right"]
    return right / len(DOCUMENTS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_both_models_in_the_harness(
    save: Save, words: str, cli: Cli, tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    folder, run = save("llama"), tmp_path / "run"
    small = run / "pruned" / "small"
    done(cli, "import", "--hf", folder, "--data", f"{words}:texts", "--out", run)
    done(cli, "score", run, "--criterion", "magnitude")
    done(cli, "prune", run, "--criterion", "magnitude", "--structure", "channels", "--sparsity", "0.3", "--name", "small")
    asked = ("eval", small, "--lm-eval", "first_letters", "--lm-eval-include", tasks)
    found = cli(*asked)
    assert found.code == 1 or found.code == 2
    assert f"{folder}: has no tokenizer" in found.err
    tokenizer(folder)
    monkeypatch.setattr(
        harness, "_manager", lambda names, include: TaskManager(include_path=str(include), include_defaults=False)
    )
    found = cli("eval", small, "--lm-eval", "first_letter", "--lm-eval-include", tasks)
    assert "the harness has no task 'first_letter'; did you mean first_letters" in found.err
    assert not (small / "eval.json").exists()
    printed = done(cli, *asked)
    assert "first_letters" in printed
    told = json.loads((small / "eval.json").read_text())["lm_eval"]["tasks"]["first_letters"]
    assert (told["samples"], told["version"]) == (len(DOCUMENTS), "2")
    opened = Run(run)
    for name, model in (("dense", opened.model), ("pruned", open_pruned(opened, small)[2])):
        assert math.isclose(told[name]["acc"], accuracy(model.eval()))
    assert "first_letters" in done(cli, "eval", small)  # the figures stay
    done(cli, "report", run)
    assert "in the lm-evaluation-harness" in (run / "report.html").read_text()


@pytest.mark.slow
def test_what_is_no_language_model_is_refused(save: Save, words: str, cli: Cli, tmp_path: Path, tasks: Path) -> None:
    run = tmp_path / "run"
    done(cli, "import", "--hf", save("bert"), "--data", f"{words}:classes", "--out", run)
    done(cli, "score", run, "--criterion", "magnitude")
    done(cli, "prune", run, "--criterion", "magnitude", "--sparsity", "0.3", "--name", "small")
    found = cli("eval", run / "pruned" / "small", "--lm-eval", "first_letters", "--lm-eval-include", tasks)
    assert (found.code, "BertForSequenceClassification is none" in found.err) == (2, True)
    found = cli("eval", run / "pruned" / "small", "--lm-eval-limit", "3")
    assert "go with --lm-eval TASKS" in found.err
