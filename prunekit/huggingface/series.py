"""Several folders as the states of one model, in training order: checkpoints, a base model and what was tuned from it, adapters.

The last state is the model. What an earlier folder cannot say is the head, which training made: it is then taken as the last has
it, so that it stands still along the path and every state is a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit.errors import ArtifactError, UsageError, theirs
from prunekit.huggingface.adapters import Adapter, base_of, is_adapter
from prunekit.huggingface.classes import model_class, read_config
from prunekit.huggingface.folder import CONFIG, Folder
from prunekit.huggingface.loading import load_model, quietly, typed

PASSING = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "use_cache", "gradient_checkpointing", "output_hidden_states", "output_attentions",
    "return_dict", "classifier_dropout", "tie_word_embeddings", "initializer_range", "task_specific_params",
)  # fmt: skip
"""Keys of two configs that may differ along a path: what the head is for, and what decides nothing of the function."""


class Series:
    """Reads folders as states of the model in the last.

    Args:
        folders: whole models, the last of which is the model; or one and then adapters of it (``with_base``).
        auto: name of an Auto class; None for the config's ``architectures``, or for what the adapters were trained in.

    Attributes:
        folders: as given.
        model: the folder whose config the model is made from.
        auto: as given, or as the adapters say it.
        head: tensors of the last state that an earlier folder lacks, by name.
        notes: what the user should know.

    Raises:
        UsageError: adapters do not follow one whole model.
        ArtifactError: a file is missing or damaged, or an earlier state is of another model; names the first tensor.
    """

    def __init__(self, folders: Sequence[Path], auto: str | None = None) -> None:
        adapters = [path for path in folders if is_adapter(path)]
        if adapters and folders[-len(adapters) :] != adapters:
            raise UsageError(f"{folders[-1]}: a whole model after the adapter {adapters[0]}; name the model, then its adapters")
        if adapters and len(folders) - len(adapters) != 1:
            raise UsageError(f"{adapters[0]}: an adapter goes with one model, and {len(folders) - len(adapters)} are named")
        self.folders, self.model = list(folders), folders[0] if adapters else folders[-1]
        self.auto = auto if auto is not None or not adapters else _auto(Adapter(adapters[-1]), self.model)
        self.head: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self._moved: list[str] = []

    def look(self) -> None:
        """Reads every state once, so that ``head`` and ``notes`` are known."""
        lacking = {name: path for path in self.folders[:-1] if not self._alike(path) for name in self._whole(path)[1]}
        last = self._whole(self.folders[-1])[0] if lacking or is_adapter(self.folders[-1]) else {}
        if lacking:
            self.head = {name: last[name].clone() for name in sorted(lacking)}
            first, more = next(iter(self.head)), len(self.head) - 1
            self.notes.append(
                f"{lacking[first]} lacks {first}{f' (and {more} more)' if more else ''}: the head is taken as it is at the end, "
                "does not move, and may not be pruned"
            )
        if self._moved:
            self.notes.append(
                f"the adapters move {len(self._moved)} tensors ({self._moved[0]} first) and leave the others as in the base; "
                "criteria that look at the path score those 0 (docs/huggingface.md)"
            )

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of one state, by the model's names."""
        state, lacking = self._whole(path)
        return {**state, **{name: self.head[name] for name in lacking}}

    def _whole(self, path: Path) -> tuple[dict[str, Tensor], list[str]]:
        """The state in a folder, and which names of it are not the folder's own."""
        if self._alike(path):
            return dict(load_model(path, self.auto).state_dict()), []
        model, lacking = self._as_last(self.model if is_adapter(path) else path)
        if is_adapter(path):
            self._moved = Adapter(path).merge_into(model)
            lacking = [name for name in lacking if name not in self._moved]
            if lacking:
                raise ArtifactError(
                    f"{path}: neither the adapter nor its base {self.model} has {lacking[0]}, which {type(model).__name__} "
                    "needs; train with the head in modules_to_save, or name another class by --auto"
                )
        return dict(model.state_dict()), lacking

    def _alike(self, path: Path) -> bool:
        """Whether a folder is a whole model of the last one's class and config, which is then read as it is."""
        if is_adapter(path) or is_adapter(self.folders[-1]):
            return False
        return path == self.model or Folder(path).config_digest() == Folder(self.model).config_digest()

    def _as_last(self, path: Path) -> tuple[Any, list[str]]:
        """A model of the last one's class and config with the folder's weights, and the head's tensors that these lack."""
        whole, own = Folder(self.model), Folder(path)
        kind, config = model_class(whole, self.auto), read_config(whole)
        _ = own.shards
        if path != self.model:
            self._compare(own, config)
        with theirs(f"{path}: loading it as {kind.__name__}"), quietly():
            model, info = kind.from_pretrained(
                path, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **typed(whole),
            )  # fmt: skip
        body = f"{model.base_model_prefix}."
        shapes = {key: (tuple(held), tuple(wanted)) for key, held, wanted in info["mismatched_keys"]}
        lacking = sorted({*info["missing_keys"], *shapes})
        if wrong := [name for name in lacking if _of_body(name, body, model)]:
            held, wanted = shapes.get(wrong[0], (None, None))
            how = "lacks" if held is None else f"has in another shape {held}, not {wanted},"
            raise ArtifactError(
                f"{path}: {how} {wrong[0]}, which is no part of the head of {self.model}{_others(wrong)}; the folders are not of "
                "one model"
            )
        if extra := sorted(name for name in info["unexpected_keys"] if _of_body(name, body, model)):
            raise ArtifactError(
                f"{path}: has {extra[0]}{_others(extra)}, for which {kind.__name__} in {self.model} has no place; the folders "
                "are not of one model"
            )
        return model, lacking

    def _compare(self, own: Folder, config: Any) -> None:
        """Notes what the two configs say differently, which a path takes as the last says it.

        Raises:
            ArtifactError: they are of different kinds of model.
        """
        mine, last = read_config(own).to_dict(), config.to_dict()
        if mine["model_type"] != last["model_type"]:
            raise ArtifactError(
                f"{own.path / CONFIG}: model_type is {mine['model_type']}, in {self.model} it is {last['model_type']}; a path is "
                "of one model"
            )
        other = [
            key for key in sorted(mine.keys() | last.keys())
            if mine.get(key) != last.get(key) and key not in PASSING and "dropout" not in key and not key.endswith("_token_id")
        ]  # fmt: skip
        for key in other:
            text = f"{own.path / CONFIG}: {key} is {mine.get(key)!r:.60}, taken as {last.get(key)!r:.60}, as in {self.model}"
            if text not in self.notes:
                self.notes.append(text)


def with_base(folders: Sequence[Path]) -> list[Path]:
    """The folders; before adapters alone their base model's, where the training of an adapter that began with ``B = 0`` began.

    Raises:
        UsageError: the adapters have several bases.
        ArtifactError: one says none that is here.
    """
    return [base_of(list(folders)), *folders] if folders and all(map(is_adapter, folders)) else list(folders)


def _auto(adapter: Adapter, base: Path) -> str | None:
    """The Auto class that an adapter was trained in, where the base's own class is another."""
    folder = Folder(base)
    if adapter.auto is None or (folder.architecture and model_class(folder, None) is model_class(folder, adapter.auto)):
        return None
    return adapter.auto


def _of_body(name: str, body: str, model: Any) -> bool:
    """Whether a tensor is of what a head stands on; the pooler, which base models may lack, counts as head."""
    inside, part = name.removeprefix(body), name.removeprefix(body).split(".")[0]
    parts = {child for child, _ in model.base_model.named_children()} - {"pooler"}
    return part in parts if model.base_model is model or inside != name else name.split(".")[0] in parts


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
