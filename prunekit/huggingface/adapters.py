"""LoRA adapters: a folder with adapter_config.json, merged into its base model without peft.

LoRA (Hu et al. 2021, arXiv 2106.09685): ``W + s B A`` with ``A (r, in)``, ``B (out, r)`` and ``s = alpha / r``, or ``alpha / √r``
(rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). Merged weights are a whole model, so a path through them is one as any other.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunekit import bounded
from prunekit.errors import ArtifactError, UsageError
from prunekit.huggingface.folder import ADAPTER, CONFIG
from prunekit.trajectory.ties import tied

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Keys of a config that go with plain LoRA; every other one asks for something else and must be empty."""
UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model's own weights as they are."""
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""``task_type`` of an adapter -> the Auto class that it was trained in."""
PARTS = re.compile(r"(?P<module>.*)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


@dataclass(frozen=True)
class Adapter:
    """A folder that peft's ``save_pretrained`` wrote, or a trainer's checkpoint of such training."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What adapter_config.json says, of plain LoRA.

        Raises:
            ArtifactError: it is no JSON mapping, or asks for anything that is not plain LoRA; names the key and its value.
        """
        place = self.path / ADAPTER
        found = bounded.mapping(place)

        def refuse(key: str, text: str) -> None:
            raise ArtifactError(
                f"{place}: {key} is {found.get(key)!r:.80}, {text}; merge it with peft (merge_and_unload, then save_pretrained)"
            )

        if found.get("peft_type") != "LORA":
            refuse("peft_type", "and prunekit merges LORA alone")
        if found.get("bias", "none") != "none":
            refuse("bias", "and prunekit merges adapters without biases")
        if found.get("init_lora_weights", True) not in UNCHANGED:
            refuse("init_lora_weights", "which changed the base model's weights as well")
        for key, value in found.items():
            if key not in FREE and key != "bias" and value:
                refuse(key, "which is not plain LoRA")
        for key in ("lora_alpha", "r"):
            if isinstance(found.get(key), bool) or not isinstance(found.get(key), int | float) or not found[key] > 0:
                refuse(key, "which must be a number above 0")
        patterns = found.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(isinstance(value, int | float) for value in patterns.values()):
            refuse("alpha_pattern", "which must be a mapping from modules to numbers")
        if odd := next((name for name in patterns if not re.fullmatch(r"[\w.]+", name)), None):
            refuse("alpha_pattern", f"and {odd!r:.60} is a regular expression, where prunekit takes names of modules")
        return found

    @property
    def base(self) -> Path:
        """The folder of the model that it belongs to.

        Raises:
            ArtifactError: that is no folder of this machine's.
        """
        name = self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name or "\0" in name or not (Path(name) / CONFIG).is_file():
            raise ArtifactError(
                f"{self.path}: an adapter of {name!r:.120}, which is no folder here with {CONFIG}; name that model's first "
                f"(--hf BASE --hf {self.path})"
            )
        return Path(name)

    @property
    def auto(self) -> str | None:
        """The Auto class that it was trained in; None where its config says none."""
        return CLASSES.get(str(self.config.get("task_type")))

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by the names that they have beside the base model's.

        Raises:
            ArtifactError: they are missing, or the file is damaged.
        """
        place = self.path / WEIGHTS
        if not place.is_file():
            pickled = self.path / "adapter_model.bin"
            what = f"has {pickled.name} alone; save it again with safetensors" if pickled.exists() else f"lacks {WEIGHTS}"
            raise ArtifactError(f"{self.path}: {what}")
        bounded.check_header(place)
        try:
            return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(place).items()}
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{place}: not a whole safetensors file ({error}); copy it again") from None

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> list[str]:
        """Adds the adapter to the weights of its base ``model``, in place, in float32 and rounded to the model's type once.

        Returns:
            names of the tensors that it sets or moves.

        Raises:
            ArtifactError: it does not fit the model; names the first tensor.
        """
        given, own = self.tensors(), model.state_dict()
        pairs: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if (found := PARTS.fullmatch(name)) is not None:
                pairs.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = tensor
            else:
                whole[name.replace(".modules_to_save.", ".")] = tensor
        if not pairs:
            raise ArtifactError(f"{self.path / WEIGHTS}: holds no lora_A and lora_B")
        several = tied(model)
        for name in (*(f"{module}.weight" for module in pairs), *whole):
            if name not in own:
                raise ArtifactError(f"{self.path / WEIGHTS}: is for {name}, which {type(model).__name__} does not have")
            if name in several:
                raise ArtifactError(
                    f"{self.path}: {name} is tied to {' and '.join(n for n in several[name] if n != name)} in the base model and "
                    "not in the adapter; untie them (tie_word_embeddings: false) and train again, or merge it with peft"
                )
        for name, tensor in whole.items():
            if own[name].shape != tensor.shape:
                raise ArtifactError(
                    f"{self.path / WEIGHTS}: {name} has shape {tuple(tensor.shape)}, by the base's {CONFIG} it is "
                    f"{tuple(own[name].shape)}; say the adapter's there (num_labels, vocab_size)"
                )
            own[name].copy_(tensor)
        for module, parts in pairs.items():
            weight = own[f"{module}.weight"]
            weight.copy_(weight.float() + self._delta(module, model.get_submodule(module), parts, tuple(weight.shape)))
        return [*(f"{module}.weight" for module in pairs), *whole]

    def _delta(self, name: str, module: nn.Module, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """``s B A`` in the shape of the module's weight."""
        embedding = isinstance(module, nn.Embedding)
        kind = "lora_embedding_" if embedding else "lora_"
        turned = embedding or type(module).__name__ == "Conv1D"  # both keep (in, out)
        if not (turned or isinstance(module, nn.Linear)):
            raise ArtifactError(
                f"{self.path}: adapts {name}, a {type(module).__name__}; prunekit merges into linear layers alone"
            )
        if set(parts) != {f"{kind}A", f"{kind}B"}:
            raise ArtifactError(f"{self.path / WEIGHTS}: of {name} it has {' and '.join(sorted(parts))}; it must have A and B")
        a, b = parts[f"{kind}A"].float(), parts[f"{kind}B"].float()
        wanted = shape[::-1] if turned else shape
        if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != wanted or a.shape[0] != b.shape[1]:
            raise ArtifactError(
                f"{self.path / WEIGHTS}: of {name}, A {tuple(a.shape)} and B {tuple(b.shape)} do not make its weight {shape}"
            )
        rank = a.shape[0]
        patterns = self.config.get("alpha_pattern") or {}
        key = next((key for key in patterns if name == key or name.endswith(f".{key}")), None)
        alpha = self.config["lora_alpha"] if key is None else patterns[key]
        delta: Tensor = b @ a * (alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))
        return delta.T if turned else delta


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (path / ADAPTER).is_file() and not (path / CONFIG).exists()


def base_of(adapters: list[Path]) -> Path:
    """The one folder that the adapters belong to.

    Raises:
        UsageError: they say different ones.
        ArtifactError: one says none that is here.
    """
    bases = list(dict.fromkeys(Adapter(path).base for path in adapters))
    if len(bases) > 1:
        raise UsageError(f"{adapters[0]} is an adapter of {bases[0]}, and others of {bases[1]}; a path has one base")
    return bases[0]
