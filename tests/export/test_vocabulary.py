"""Tokens that the data never use leave embedding, output layer and tokenizer; everything else computes what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prunekit
from prunekit import ArtifactError, UsageError
from prunekit.exporting.vocabulary import vocabulary_of
from tests.export.conftest import pruned, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
TEXTS = ["the lower road is slower", "a newer tower and the lower river", "the lower road"]
CORPUS = [*TEXTS, "widest wildest kindest windmills, finding minds behind"] * 3
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
Case = tuple[Path, Any, dict[str, Tensor], Any, Any]


def saved(folder: Path, tokenizer: Any, model: Any, **special: str) -> Case:
    """Model and tokenizer in a folder; the model pruned, its inputs, its plan, its tokenizer."""
    made = transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.save_pretrained(folder)
    model.save_pretrained(folder)
    dense = type(model).from_pretrained(folder)
    found = made(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
    small, plan = pruned(dense, inputs, "unstructured")
    return folder, small, inputs, plan, made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Byte-level BPE, whose special tokens have the highest numbers, and a tied output layer."""
    library, parts = transformers(), pytest.importorskip("tokenizers")
    tokenizer = parts.Tokenizer(parts.models.BPE())
    tokenizer.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = parts.decoders.ByteLevel()
    alphabet = parts.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, parts.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    first = tokenizer.token_to_id("<s>")
    torch.manual_seed(0)
    config = library.LlamaConfig(
        vocab_size=first + 5, **SMALL, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=first,
        eos_token_id=first + 1, pad_token_id=first + 1,
    )  # fmt: skip
    model = library.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("llama")
    return saved(folder, tokenizer, model, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    library, parts = transformers(), pytest.importorskip("tokenizers")
    tokenizer = parts.Tokenizer(parts.models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = parts.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = parts.decoders.WordPiece()
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, parts.trainers.WordPieceTrainer(vocab_size=140, special_tokens=special))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = parts.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    config = library.BertConfig(vocab_size=size, **SMALL, max_position_embeddings=64, pad_token_id=1)
    model = library.BertForMaskedLM(config)
    return saved(
        tmp_path_factory.mktemp("bert"), tokenizer, model, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_data_keep_tokens_and_answers_under_new_numbers(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _, small, inputs, plan, before = request.getfixturevalue(name)
    record = prunekit.export(small, "hf", tmp_path / "out", inputs, plan=plan, used_tokens=[(inputs, None)])
    after = transformers().PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    back = type(small).from_pretrained(tmp_path / "out")
    new = after(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(new["attention_mask"], inputs["attention_mask"])
    for old_ids, new_ids in zip(inputs["input_ids"].tolist(), new["input_ids"].tolist(), strict=True):
        assert before.convert_ids_to_tokens(old_ids) == after.convert_ids_to_tokens(new_ids)
    rows = [before.convert_tokens_to_ids(after.convert_ids_to_tokens(number)) for number in range(len(after))]
    assert rows == sorted(set(rows))
    assert back.config.vocab_size == len(after) < len(before)
    with torch.no_grad():
        expected = small(**inputs).logits[..., rows]
        found = back(input_ids=new["input_ids"], attention_mask=new["attention_mask"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert record.difference is not None
    gone = small.config.vocab_size - len(after)
    fewer = gone * (small.config.hidden_size + (name == "bert"))  # the output layer is tied; BERT's has a bias
    assert sum(p.numel() for p in small.parameters()) - sum(p.numel() for p in back.parameters()) == fewer
    assert f"of {small.config.vocab_size} tokens {len(after)} stay" in record.notes[0]
    assert f"tokens {len(after)} stay" in (tmp_path / "out" / "README.md").read_text()
    assert small.get_input_embeddings().num_embeddings == small.config.vocab_size  # the model itself is as it was
    unseen = "a windmill is wider"
    assert after.unk_token_id is None or after.unk_token_id not in after(unseen)["input_ids"]
    assert after.decode(after(unseen)["input_ids"], skip_special_tokens=True) == unseen


def test_special_tokens_take_their_new_numbers_along_and_generate_runs(llama: Case, tmp_path: Path) -> None:
    _, small, inputs, plan, _ = llama
    prunekit.export(small, "hf", tmp_path / "out", inputs, plan=plan, used_tokens=[(inputs, inputs["input_ids"])])
    after = transformers().PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    back = type(small).from_pretrained(tmp_path / "out")
    for config in (back.config, back.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (after.bos_token_id, after.eos_token_id)
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    start = after(TEXTS[:1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = back.generate(start, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > start.shape[1]
    other = "naïve 東京 \U0001f600"
    assert after.decode(after(other)["input_ids"]) == other


def test_tokens_of_labels_and_of_the_config_stay(llama: Case) -> None:
    _, small, inputs, _, before = llama
    without = vocabulary_of(small, [(inputs, None)]).places
    label = next(
        n for n, token in enumerate(before.convert_ids_to_tokens(range(len(before)))) if n not in without and len(token) > 2
    )
    labels = torch.tensor([[-100, label]])
    stays = vocabulary_of(small, [(inputs, labels)]).places
    assert label in stays
    assert {small.config.bos_token_id, small.config.eos_token_id} <= set(without)
    assert set(without) < set(stays)


def test_a_text_that_would_have_other_tokens_is_refused(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, small, inputs, plan, _ = llama
    from prunekit.exporting import tokenizer_rows

    whole = tokenizer_rows.smaller

    def broken(content: Any, places: Any) -> Any:
        new = whole(content, places)
        new["model"]["merges"] = new["model"]["merges"][1:]
        return new

    monkeypatch.setattr(tokenizer_rows, "smaller", broken)
    with pytest.raises(ArtifactError, match="has other tokens"):
        prunekit.export(small, "hf", tmp_path / "out", inputs, plan=plan, used_tokens=[(inputs, None)])
    assert not (tmp_path / "out").exists()


def test_unigram_and_its_padded_embedding_keep_the_unknown_piece() -> None:
    from prunekit.exporting import tokenizer_rows

    pieces = [
        ["<pad>", 0.0],
        ["<unk>", 0.0],
        ["▁", -2.0],
        ["▁low", -3.0],
        ["er", -3.5],
        ["▁new", -4.0],
        ["w", -9.0],
        ["zz", -11.0],
    ]
    content = {"model": {"type": "Unigram", "unk_id": 1, "vocab": pieces}, "added_tokens": [{"id": 0, "content": "<pad>"}]}
    stays = tokenizer_rows.staying(content, {3})
    assert stays == {0, 1, 2, 3, 6, 7}  # the last one sets what an unknown character costs
    new = tokenizer_rows.smaller(content, {old: number for number, old in enumerate(sorted(stays))})
    assert [piece for piece, _ in new["model"]["vocab"]] == ["<pad>", "<unk>", "▁", "▁low", "w", "zz"]
    assert new["model"]["unk_id"] == 1


def test_what_cannot_be_cut_is_refused_by_name(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, small, inputs, plan, _ = llama
    data = [(inputs, None)]
    with pytest.raises(UsageError, match="goes with hf"):
        prunekit.export(small, "state-dict", tmp_path / "out", inputs, plan=plan, used_tokens=data)
    with pytest.raises(UsageError, match="no input_ids"):
        vocabulary_of(small, [({"pixel_values": torch.ones(1, 2)}, None)])
    monkeypatch.setattr(small.config, "image_token_index", 3, raising=False)
    with pytest.raises(UsageError, match="image_token_index"):
        vocabulary_of(small, data)
    monkeypatch.undo()
    small.register_buffer("bias_of_all", torch.zeros(1, small.config.vocab_size))
    with pytest.raises(UsageError, match="bias_of_all"):
        vocabulary_of(small, data)
    del small.bias_of_all
    monkeypatch.setattr(small, "name_or_path", str(tmp_path))
    with pytest.raises(UsageError, match=r"tokenizer\.json: not there"):
        vocabulary_of(small, data)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "WordLevel"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="its model is WordLevel"):
        vocabulary_of(small, data)
    assert not (tmp_path / "out").exists()
