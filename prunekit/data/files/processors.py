"""The tokenizer, image processor or feature extractor of a model's folder, and how long a sample may be.

Nothing is fetched, and no code that lies in the folder is run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit import bounded
from prunekit.data.files.options import Options
from prunekit.errors import UsageError, quoted
from prunekit.huggingface import CONFIG, quietly
from prunekit.huggingface.classes import read_config, transformers
from prunekit.huggingface.folder import Folder

KINDS = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
FILES = {
    "text": "a tokenizer (tokenizer.json)",
    "image": "an image processor (preprocessor_config.json)",
    "audio": "a feature extractor (preprocessor_config.json)",
}
SMALL = (".json", ".txt", ".model", ".tiktoken", ".spm", ".bpe")
"""Endings of files that a tokenizer or processor can be made of."""
OFFSET = ("roberta", "camembert", "longformer", "mpnet")
"""In names of model types whose positions begin after that of padding."""
CUT, WINDOW = 128, 512
"""Tokens of a text, and of a window of a language model, where nobody says how many."""


@dataclass(frozen=True)
class Home:
    """Where the processors of a model lie.

    Attributes:
        folder: of the tokenizer or processor.
        config: of the model, None of a factory's.
        model: the model's folder, None of a factory's.
    """

    folder: Path
    config: Any
    model: Path | None

    def processor(self, kind: str) -> Any:
        """The folder's tokenizer (``text``), image processor (``image``) or feature extractor (``audio``).

        Raises:
            UsageError: it has none, or the library cannot make it.
        """
        for path in self._files():
            bounded.size(path)
        library = transformers()
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder}: no such folder; name one with {FILES[kind]} as tokenizer (data.tokenizer)")
        names = {path.name for path in self._files()}
        wanted = {"preprocessor_config.json", "processor_config.json", "image_processor.json"}
        if kind == "text":
            wanted = names - wanted - {CONFIG, "generation_config.json"}
        if not names & wanted:
            raise UsageError(f"{self.folder}: has not {FILES[kind]}; name the folder that has it as tokenizer (data.tokenizer)")
        try:
            with quietly():
                made = getattr(library, KINDS[kind]).from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library's many kinds
            raise UsageError(f"{self.folder}: transformers cannot make {FILES[kind]} of it: {quoted(error)}") from None
        return made

    def digest(self) -> str:
        """A hash of the files that the processors are made of."""
        found = hashlib.sha256()
        for path in self._files():
            if path.name != "generation_config.json":
                found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return found.hexdigest()

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        every = sorted(path for path in self.folder.iterdir() if path.suffix in SMALL)
        return [path for path in every if not path.name.endswith(".index.json")]

    @property
    def positions(self) -> int | None:
        """The most tokens that the model takes; None where its config does not say."""
        found = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(found, int):
            return None
        pad = getattr(self.config, "pad_token_id", None)
        shifted = any(name in str(getattr(self.config, "model_type", "")) for name in OFFSET)
        return found - (1 + (pad or 0)) if shifted else found

    def length(self, options: Options, usual: int) -> int:
        """Tokens of a sample at most.

        Raises:
            UsageError: more are asked for than the model has positions.
        """
        most = self.positions
        if options.length is None:
            return usual if most is None else min(usual, most)
        if most is not None and options.length > most:
            raise UsageError(
                f"length is {options.length} (--length), and the model has {most} positions; it must be {most} at most"
            )
        return options.length

    def padding(self, tokenizer: Any) -> int:
        """The token that fills a batch up: the model's own, the tokenizer's, or else its end of text."""
        own = getattr(self.config, "pad_token_id", None)
        for found in (own, tokenizer.pad_token_id, tokenizer.eos_token_id):
            if isinstance(found, int) and found >= 0:
                return found
        return 0


def home_of(model: str | None, options: Options) -> Home:
    """Where a model's processors lie: in the folder that the options name, or in the model's.

    Raises:
        UsageError: neither is known.
    """
    if model is None and options.tokenizer is None:
        raise UsageError("data in files need the folder of a tokenizer or processor: say tokenizer (data.tokenizer)")
    folder = Path(options.tokenizer or str(model))
    config = None if model is None else read_config(Folder(Path(model)))
    return Home(folder, config, None if model is None else Path(model))
