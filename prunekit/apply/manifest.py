"""A pruned model on disk: weights, plan and manifest, rebuilt from the user's own factory without any trace or pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunekit import checkpoint
from prunekit.apply.squeeze import Squeezed
from prunekit.artifact import Artifact, conform
from prunekit.durable import replacing_folder
from prunekit.errors import ArtifactError, NonFiniteError, UsageError
from prunekit.measure import Lost, Speed
from prunekit.plan import Plan
from prunekit.plan.plan import SIZE_ATTRIBUTES
from prunekit.structure.cut import Cut
from prunekit.structure.replacements import known
from prunekit.trajectory import load_into
from prunekit.trajectory.bare import bare, named_tensors
from prunekit.trajectory.derived import derived_weights
from prunekit.trajectory.ties import refuse_overlaps
from prunekit.version import __version__

MODEL, MASKS = "model.safetensors", "masks.safetensors"
PRUNED = "pruned.safetensors"
"""The weights in a folder of transformers whose config cannot say their shapes: under a name that transformers does not read."""
KINDS = {MODEL: "model", PRUNED: "model", MASKS: "masks"}
TOLD: dict[str, Any] = {"validation": Lost, "budget": dict[str, float], "reached": float, "speed": Speed}
"""Facts that verdicts are made of."""


@dataclass(frozen=True)
class Manifest(Artifact):
    """Everything but the numbers.

    Attributes:
        structure: the plan's.
        kept: ``<param>@<axis>`` -> kept indices on that axis of the dense model (structured plans, squeezed models).
        attributes: module name -> size attributes of the pruned layer (``SIZE_ATTRIBUTES``).
        aliases: tied names that model.safetensors holds once.
        plan: digest of the plan.
        provenance: the plan's, and the version.
        facts: sparsity reached, and other facts for people.
        replaced: module -> kind of what takes its place (a removed block, a narrower attention).
        files: file beside it -> its checksum; empty in older manifests.
    """

    KIND: ClassVar[str] = "pruned"
    CALLED: ClassVar[str] = "manifest"

    structure: str
    kept: dict[str, list[int]]
    attributes: dict[str, dict[str, int]]
    aliases: dict[str, str]
    plan: str
    provenance: dict[str, Any]
    facts: dict[str, Any]
    replaced: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def cut(self) -> Cut:
        """What the dense model lacks in this one."""
        attributes = {f"{name}:{key}": value for name, found in self.attributes.items() for key, value in found.items()}
        return Cut({key: torch.tensor(kept) for key, kept in self.kept.items()}, attributes, self.replaced)

    def tensors(self, folder: Path, name: str) -> dict[str, Tensor]:
        """What ``MODEL`` or ``MASKS`` holds in the manifest's folder.

        Raises:
            ArtifactError: it is missing, damaged, was changed, or belongs to another manifest.
        """
        path = folder / name
        header = checkpoint.read_header(path, KINDS[name])
        if header.get("plan") != self.plan:
            raise ArtifactError(f"{folder}: {name} belongs to plan {header.get('plan')}, prunekit.json to {self.plan}")
        tensors = checkpoint.read_tensors(path)
        if name in self.files:
            written = self.files[name]
            checkpoint.agree(path, checkpoint.read_checksum(path), written, "is not the file that prunekit.json was written with")
        return tensors

    def prove(self, folder: Path) -> list[str]:
        """Reads every file beside the manifest; returns their names.

        Raises:
            ArtifactError: as ``tensors``, or the plan is not the one that was applied.
        """
        plan = Plan.load(folder / "plan.safetensors")
        if plan.digest != self.plan:
            raise ArtifactError(f"{folder}: plan.safetensors is {plan.digest}, the model was pruned by {self.plan}")
        names = [MODEL, MASKS] if plan.masking else [MODEL]
        for name in names:
            self.tensors(folder, name)
        return ["plan.safetensors", *names]

    def check(self) -> None:
        """Only sizes of layers may be set, only known modules put in, only indices kept: a manifest is data, not code."""
        for facts in (self.provenance, self.facts):
            conform(facts.get("request", {}), dict[str, Any], "request")
        for key, kept in self.kept.items():
            key.rsplit("@", 1)[1]
            if not kept or min(kept) < 0:
                raise ValueError(f"kept {key} must be indices")
        for name, attributes in self.attributes.items():
            for attribute, value in attributes.items():
                if attribute not in SIZE_ATTRIBUTES or value < 1:
                    raise ValueError(f"attribute {name}.{attribute} = {value!r}")
        for name, kind in self.replaced.items():
            if not name or not known(kind):
                raise ValueError(f"{name!r} replaced by {kind!r}")
        for name, expected in TOLD.items():
            if name in self.facts:
                conform(self.facts[name], expected, f"facts.{name}")


def save(
    model: nn.Module, plan: Plan, folder: str | Path, facts: Mapping[str, Any] | None = None, squeezed: Squeezed | None = None
) -> Manifest:
    """Writes a pruned model as a folder, whole or not at all.

    ``model.safetensors`` (reads with ``safetensors.torch.load_file`` alone), ``plan.safetensors``,
    ``prunekit.json``, and where single weights go ``masks.safetensors``, since a kept weight can be exactly 0.

    Args:
        model: what ``prune(dense, plan)`` returned, fine-tuned or not.
        plan: the plan it was pruned by.
        folder: replaced if it exists.
        squeezed: what ``squeeze`` returned, where ``model`` is its model, fine-tuned or not.

    Raises:
        ArtifactError: the model is not one that this plan makes, or the disk is full.
        NonFiniteError: a parameter, or a weight that is computed from some, holds NaN or Inf.
        StructureError: two parameters share memory without being the same one.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory, make_plan, prune, save, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> folder = getfixture("tmp_path") / "small"
        >>> manifest = save(prune(model, plan), plan, folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['masks.safetensors', 'model.safetensors', 'plan.safetensors', 'prunekit.json']
    """
    folder, model = Path(folder), bare(model)
    manifest = manifest_of(model, plan, facts, squeezed)
    with replacing_folder(folder) as temporary:
        written = {MODEL: write_weights(model, manifest, temporary / MODEL)}
        if plan.masking:
            masks = plan.weight_masks() if squeezed is None else squeezed.masks
            bits = {name: mask.to(torch.uint8) for name, mask in masks.items()}
            written[MASKS] = checkpoint.write_tensors(temporary / MASKS, bits, {"kind": "masks", "plan": plan.digest})
        plan.save(temporary / "plan.safetensors")
        manifest = replace(manifest, files=written)
        manifest.save(temporary / "prunekit.json")
    return manifest


def manifest_of(
    model: nn.Module, plan: Plan, facts: Mapping[str, Any] | None = None, squeezed: Squeezed | None = None
) -> Manifest:
    """What ``save`` writes beside the weights, but for the files' checksums.

    Raises:
        ArtifactError, NonFiniteError, StructureError: as ``save``.
    """
    taken = plan if squeezed is None else squeezed.plan
    _check_fits(model, plan, taken, plan.weight_masks() if squeezed is None else squeezed.masks)
    _check_finite(model)
    return Manifest(
        plan.structure,
        {key: indices.tolist() for key, indices in taken.kept_indices().items()},
        _attributes(model, taken),
        checkpoint.unique_state(model.state_dict())[1],
        plan.digest,
        {"prunekit": __version__, "torch": torch.__version__, **plan.provenance},
        {
            "sparsity": plan.sparsity(),
            **({} if squeezed is None else {"squeezed": {"removed": squeezed.removed, "left": squeezed.left}}),
            **(facts or {}),
        },
        taken.replaced(),
    )


def write_weights(model: nn.Module, manifest: Manifest, path: Path) -> str:
    """Writes the model's tensors, tied ones once; returns the checksum that proves the file."""
    state, _ = checkpoint.unique_state(model.state_dict())
    return checkpoint.write_tensors(path, state, {"kind": "model", "plan": manifest.plan})


def load(folder: str | Path, model_factory: Callable[[], nn.Module]) -> nn.Module:
    """Gives back a saved pruned model, in evaluation mode.

    Args:
        folder: what ``save`` wrote.
        model_factory: builds the dense architecture; called without arguments. On the meta device it takes no memory until its
            weights come. Where it ties what the saved model tied, they are tied again; else each gets the same numbers.

    Raises:
        UsageError: ``model_factory`` is no function, or builds no model.
        ArtifactError: files are missing or damaged, or the factory builds another architecture.
        NonFiniteError: a weight is NaN or Inf.

    Example:
        >>> import copy
        >>> import torch
        >>> from prunekit import Trajectory, load, make_plan, prune, save, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> small = prune(model, plan).eval()
        >>> manifest = save(small, plan, getfixture("tmp_path") / "small")
        >>> back = load(getfixture("tmp_path") / "small", lambda: copy.deepcopy(model))
        >>> torch.equal(back[0].weight, small[0].weight)
        True
    """
    folder = Path(folder)
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        what = type(model_factory).__name__
        raise UsageError(
            f"model_factory is a {what}; give a function that builds the dense model anew, such as lambda: MyModel()"
        )
    manifest = Manifest.load(folder / "prunekit.json")
    weights = PRUNED if PRUNED in manifest.files else MODEL
    state = manifest.tensors(folder, weights)
    model = model_factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model_factory returned a {type(model).__name__}, not an nn.Module")
    inner = bare(model)
    with checkpoint.reading(folder / "prunekit.json", "manifest"):
        _shrink(inner, manifest, folder)
    own = set(inner.state_dict())
    state |= {alias: state[name] for alias, name in manifest.aliases.items() if alias in own and name in state}
    load_into(inner, state, folder / weights)
    _check_numbers(inner, state, folder / weights)
    return model.eval()


def _check_numbers(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in state.items():
        numbers = tensor if tensor.element_size() > 1 else tensor.float()
        if bool(numbers.isnan().any()) or (name in parameters and bool(numbers.isinf().any())):
            raise NonFiniteError(f"{path}: {name} holds NaN or Inf; such a model gives no answers, so prune again")


def _shrink(model: nn.Module, manifest: Manifest, folder: Path) -> None:
    """Gives the factory's model the shapes and sizes of the pruned one."""
    named = named_tensors(model)
    for key, kept in manifest.kept.items():
        name, axis = key.rsplit("@", 1)
        if name not in named or int(axis) >= named[name].dim() or max(kept) >= named[name].shape[int(axis)]:
            raise ArtifactError(f"{folder}: {key} does not fit the factory's model; it is another architecture")
    try:
        manifest.cut.carry_out(model)
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder}: does not fit the factory's model ({error}); it is another architecture") from error


def dense_state(model: nn.Module, plan: Plan, kept: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """The pruned model's weights in dense coordinates by name, 0 where something was removed.

    Args:
        kept: the manifest's, for a squeezed model; the plan's own when None.
    """
    named = named_tensors(bare(model))
    like = next(iter(named.values()), torch.empty(0))
    stays = plan.kept_indices() if kept is None else {key: torch.tensor(indices) for key, indices in kept.items()}
    found = {}
    for name, shape in plan.shapes.items():
        if name not in named:  # it left with its block
            found[name] = like.new_zeros(shape)
            continue
        small = named[name].detach()
        if tuple(small.shape) == tuple(shape):
            found[name] = small
            continue
        places = [stays.get(f"{name}@{axis}", torch.arange(size)) for axis, size in enumerate(shape)]
        found[name] = small.new_zeros(shape)
        found[name][torch.meshgrid(*places, indexing="ij")] = small
    return found


def _attributes(model: nn.Module, taken: Plan) -> dict[str, dict[str, int]]:
    touched = {member.rsplit("@", 1)[0].rpartition(".")[0] for member in taken.kept_indices()}
    touched |= {key.rpartition(":")[0] for key in taken.lowered()}
    found = {}
    for name in sorted(touched):
        values = {a: getattr(model.get_submodule(name), a, None) for a in SIZE_ATTRIBUTES}
        found[name] = {a: v for a, v in values.items() if type(v) is int and v >= 1}
    return found


def _check_finite(model: nn.Module) -> None:
    refuse_overlaps(model)
    computed = [(one.name, one.value(), f", which {one.how} computes,") for one in derived_weights(model)]
    for name, tensor, how in [*((name, p, "") for name, p in model.named_parameters()), *computed]:
        if tensor.is_meta:
            raise ArtifactError(f"{name} is on the meta device and has no numbers to save")
        if not bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all()):
            raise NonFiniteError(f"{name}{how} holds NaN or Inf; such a model is not saved")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):  # a mask of attention may hold -Inf
            raise NonFiniteError(f"{name} holds NaN; such a model is not saved")


def _check_fits(model: nn.Module, plan: Plan, taken: Plan, masks: Mapping[str, Tensor]) -> None:
    named = named_tensors(model)
    kept, skipped = taken.kept_indices(), taken.skipped()
    for name, shape in plan.shapes.items():
        if any(name.startswith(f"{block}.") for block in skipped):
            if name in named:
                raise ArtifactError(f"this model is not the plan's: it has {name}, which the plan removes with its block")
            continue
        expected = tuple(len(kept.get(f"{name}@{axis}", range(size))) for axis, size in enumerate(shape))
        if name not in named or tuple(named[name].shape) != expected:
            found = tuple(named[name].shape) if name in named else "absent"
            raise ArtifactError(f"this model is not the plan's: {name} is {found}, the plan makes it {expected}")
    for name, mask in masks.items():
        if bool((named[name].detach().cpu()[~mask] != 0).any()):
            raise ArtifactError(f"this model is not the plan's: {name} has weights other than 0 where the mask removes them")
