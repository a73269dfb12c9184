"""The papers' protocol on small random models, against their loop written plainly; what cannot be right is refused by name."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import public_models
from benchmarks.paper_protocol import (
    KNOWN,
    Published,
    calibration_windows,
    following_windows,
    joined_text,
    published,
    window_length,
)
from benchmarks.zoo.operators import declare
from prunekit.errors import ArtifactError, UsageError

declare()
transformers = pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(50)]
LENGTH = 16
ROWS = 60
SIZES = {"vocab_size": 56, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"intermediate_size": 24}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
}
Folders = Callable[..., Path]


def rows(seed: int) -> list[str]:
    """Rows as of WikiText: texts that end in a newline, and blank ones."""
    draw = random.Random(seed)
    return ["" if i % 3 == 0 else " ".join(draw.choices(WORDS, k=draw.randint(1, 20))) + "\n" for i in range(ROWS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders of models with a tokenizer of whole words that puts ``<s>`` in front of a text; made once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made: dict[str, Path] = {}
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\n", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    def folder(kind: str) -> Path:
        if kind not in made:
            config, model, more = MODELS[kind]
            torch.manual_seed(0)
            built = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **TOKENS, **more))
            with torch.no_grad():
                for parameter in built.parameters():
                    parameter.mul_(4 if parameter.dim() > 1 else 1)  # so that windows matter
            made[kind] = tmp_path_factory.mktemp(kind)
            built.save_pretrained(made[kind])
            whole.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test set as ``wiki.test.raw`` is: rows that are blank hold a space there."""
    path = tmp_path_factory.mktemp("text") / "wiki.test.raw"
    path.write_text("".join(row or " \n" for row in rows(1)))
    return path


def papers(model: nn.Module, tokenizer: Any, texts: list[str], length: int) -> float:
    """The loop of the papers' code."""
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids
    count = ids.numel() // length
    nlls = []
    for i in range(count):
        batch = ids[:, i * length : (i + 1) * length]
        with torch.no_grad():
            logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        nlls.append(loss.float() * length)
    return float(torch.exp(torch.stack(nlls).sum() / (count * length)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_dense_perplexity_is_that_of_the_papers_loop(kind: str, folders: Folders, raw: Path) -> None:
    said: list[str] = []
    found = public_models.measured(folders(kind), joined_text(raw), length=LENGTH, tell=said.append)
    model = public_models.read_model(folders(kind), "cpu")
    expected = papers(model, public_models.read_tokenizer(folders(kind)), rows(1), LENGTH)
    assert found["dense"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert said == [f"dense: perplexity {expected:.2f}"]
    p = found["protocol"]
    assert (p["length"], p["stride"], p["tokens"]) == (LENGTH, LENGTH, p["windows"] * (LENGTH - 1))
    assert found["model"] == MODELS[kind][1]
    assert public_models.measured(folders(kind), joined_text(raw), tell=said.append)["protocol"]["length"] == 32


@pytest.mark.slow
def test_published_figures_stand_beside_ours_at_their_length(
    folders: Folders, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Published("Tiny", ("", 0, 0, 0, 0), LENGTH, {("dense", ""): 12.5, ("wanda", "0.5"): 14.0})
    monkeypatch.setattr(public_models, "published", lambda config: known)
    said: list[str] = []
    found = public_models.measured(folders("opt"), joined_text(raw), tell=said.append)
    assert (found["model"], found["protocol"]["length"]) == ("Tiny", LENGTH)
    assert said[0].endswith("(published 12.5)")
    assert said[1:] == ["wanda, 0.5: published 14, not measured here"]
    public_models.measured(folders("opt"), joined_text(raw), length=LENGTH + 1, tell=said.append)
    assert "published" not in said[-1]


def test_texts_in_other_files_are_the_same_text(raw: Path, tmp_path: Path) -> None:
    expected = "\n\n".join(rows(1))
    assert joined_text(raw) == expected
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows(1))
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "joined.txt").write_text(expected)
    assert joined_text(tmp_path / "rows.jsonl") == joined_text(tmp_path / "rows.json.gz") == expected
    assert joined_text(tmp_path / "joined.txt", joined=True) == expected
    (tmp_path / "end.txt").write_text("a\n\nb")
    assert joined_text(tmp_path / "end.txt") == "a\n\n\n\n\nb"


def test_calibration_is_drawn_as_the_papers_draw(folders: Folders, raw: Path, tmp_path: Path) -> None:
    tokenizer = public_models.read_tokenizer(folders("llama"))
    documents = [text.strip() for text in rows(2)]
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    random.seed(0)
    expected = []
    for _ in range(5):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], return_tensors="pt").input_ids
            if ids.shape[1] > LENGTH:
                break
        i = random.randint(0, ids.shape[1] - LENGTH - 1)
        expected.append(ids[0, i : i + LENGTH])
    assert torch.equal(calibration_windows(tokenizer, path, LENGTH, 5), torch.stack(expected))
    of_text = calibration_windows(tokenizer, raw, LENGTH, 3)
    whole = tokenizer(joined_text(raw))["input_ids"]
    assert all(any(whole[i : i + LENGTH] == row.tolist() for i in range(len(whole))) for row in of_text)
    with pytest.raises(UsageError, match="none of its 60 texts is longer than a window of 500 tokens"):
        calibration_windows(tokenizer, path, 500, 1)


@pytest.mark.slow
def test_pruned_models_stand_beside_the_dense_one(folders: Folders, raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "calibration.txt"
    path.write_text("".join(rows(2)))
    said: list[str] = []
    found = public_models.measured(
        folders("llama"), joined_text(raw), length=LENGTH, calibration=path, windows=24, methods=("wanda", "snip", "learn"),
        sparsity=0.5, tokens=24 * LENGTH, tell=said.append,
    )  # fmt: skip
    assert [line.split(":")[0] for line in said] == ["dense", "wanda, 0.5", "snip, 0.5", "learn, 0.5"]
    for told in found["methods"].values():
        assert told["removed"] == pytest.approx(0.5, abs=0.01)
        assert told["kl"] > 0
        apart = told["paired"]["differences"]["perplexity"]
        assert apart["difference"] == pytest.approx(told["perplexity"] - found["dense"]["perplexity"])
    with pytest.raises(UsageError, match="--method needs --calibration"):
        public_models.measured(folders("llama"), joined_text(raw), methods=("snip",), sparsity=0.5, tell=said.append)


def test_what_lies_outside_the_blocks_stays_whole(folders: Folders) -> None:
    model = public_models.read_model(folders("opt"), "cpu")
    outside = set(public_models.outside_blocks(model))
    assert {name for name, _ in model.named_parameters() if ".layers." in name}.isdisjoint(outside)
    assert any("embed_tokens" in name for name in outside)


def test_known_models_are_known_by_their_configs() -> None:
    keys = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    for known in KNOWN:
        config = SimpleNamespace(architectures=[known.config[0]], **dict(zip(keys, known.config[1:], strict=True)))
        assert published(config) is known
        assert window_length(None, known.config[-1], known) == known.length
        config.max_position_embeddings //= 2  # the first LLaMA has the second's sizes, and half of its positions
        assert published(config) is None
    assert window_length(None, 131072, None) == 2048
    assert window_length(None, 512, None) == 512
    for asked in (1, 513):
        with pytest.raises(UsageError, match=f"--length is {asked}; a window has 2 tokens at least"):
            window_length(asked, 512, None)


def test_pickles_and_short_texts_are_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text((folders("opt") / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ArtifactError, match=r"has pytorch_model.bin, which is unpickled when it is read.*save_pretrained"):
        public_models.read_model(tmp_path, "cpu")
    with pytest.raises(UsageError, match="--text has 4 tokens, fewer than a window's 16"):
        following_windows(public_models.read_tokenizer(folders("opt")), "w1 w2 w3", LENGTH)
    (tmp_path / "text.csv").write_text("text\n")
    monkeypatch.setattr(sys, "argv", ["public_models", str(folders("opt")), "--text", str(tmp_path / "text.csv")])
    assert public_models.main() == 2
    assert "text.csv: ends in .csv; give .txt, .raw" in capsys.readouterr().err
