"""Units taken out of a model for real, from kept indices alone, and the check that this equals masking them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunekit.errors import StructureError
from prunekit.structure.groups import Group, kept_indices, shapes_of, slice_masks
from prunekit.structure.replacements import REPLACEMENTS
from prunekit.trajectory.copies import copied

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def cut(model: nn.Module, kept: Mapping[str, Tensor], attributes: Mapping[str, int], replaced: Mapping[str, str]) -> None:
    """Makes ``model`` smaller in place.

    Args:
        kept: ``<param>@<axis>`` -> kept indices.
        attributes: ``<module>:<attribute>`` -> its new value.
        replaced: module -> kind of what takes its place.

    Raises:
        ValueError: something does not fit this model.
    """
    for name, kind in replaced.items():
        _place(model, name, REPLACEMENTS[kind](model.get_submodule(name)))
    for key, value in attributes.items():
        name, attribute = key.rsplit(":", 1)
        module = model.get_submodule(name)
        old = getattr(module, attribute, None)
        if isinstance(old, bool) or not isinstance(old, int) or not 1 <= value <= old:
            raise ValueError(f"{name}.{attribute} is {old!r} and cannot become {value!r}")
        setattr(module, attribute, value)
    named = named_tensors(model)
    touched: dict[str, Tensor] = {}
    for key, indices in kept.items():
        name, axis = key.rsplit("@", 1)
        tensor = touched[name] if name in touched else named[name].detach()
        touched[name] = tensor.index_select(int(axis), indices.to(tensor.device))
    for name, tensor in touched.items():
        put(model, name, tensor)
    for owner in {name.rpartition(".")[0] for name in touched}:
        _resize(model.get_submodule(owner))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts ``tensor`` in the place of a parameter or buffer."""
    path, _, short = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, short)
    new = nn.Parameter(tensor.clone(), requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor.clone()
    setattr(module, short, new)


def values_without(model: nn.Module, lowered: Mapping[str, int]) -> dict[str, int]:
    """``<module>:<attribute>`` -> the value in ``model``, lowered."""
    found = {}
    for key, amount in lowered.items():
        name, attribute = key.rsplit(":", 1)
        found[key] = int(getattr(model.get_submodule(name), attribute)) - amount
    return found


def _place(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, short = name.rpartition(".")
    setattr(model.get_submodule(parent), short, new)
    while True:  # torch's encoder would hand nested tensors to layers that its fused kernel no longer runs
        above = model.get_submodule(parent)
        if isinstance(above, nn.TransformerEncoder):
            above.use_nested_tensor = False
        if not parent:
            return
        parent = parent.rpartition(".")[0]


def _resize(module: nn.Module) -> None:
    """Sizes that torch's layers keep beside their tensors."""
    if isinstance(module, CONVOLUTIONS):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, TRANSPOSED):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


class Prober:
    """Checks groups on a private copy of a model: float64 where the model takes it, evaluation mode.

    Args:
        example_inputs: one or two samples.

    Raises:
        StructureError: the model does not run on them.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor) -> None:
        x = example_inputs.detach().cpu()
        self.model = copied(model).cpu().eval().requires_grad_(False).double()
        self.x = x.double() if x.is_floating_point() else x
        if self._runs() is not None:  # it may cast to float32 somewhere inside
            self.model, self.x = copied(model).cpu().eval().requires_grad_(False), x
            if (reason := self._runs()) is not None:
                raise StructureError(f"the model does not run on the example inputs {tuple(x.shape)} of {x.dtype}: {reason}")
        self.shapes = shapes_of(self.model)

    def _runs(self) -> str | None:
        try:
            out = self.outputs()
        except Exception as error:  # the user's own model
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return None if isinstance(out, Tensor) else f"it returns a {type(out).__name__}, not one tensor"

    @torch.no_grad()
    def outputs(self) -> Tensor:
        out: Tensor = self.model(self.x)
        return out

    @torch.no_grad()
    def fault(self, group: Group) -> str | None:
        """Why ``group`` cannot be cut; None when the model without every second unit equals the masked one."""
        if group.size == 1 and not group.whole:
            return "all of its channels can only go together"
        keep = {group.name: torch.arange(group.size) % 2 == 0 if not group.whole else torch.zeros(1, dtype=torch.bool)}
        kept = kept_indices(group.index(), keep, self.shapes)
        removed = int((~keep[group.name]).sum())
        with self.restoring():
            named = named_tensors(self.model)
            for name, mask in slice_masks(kept, self.shapes).items():
                put(self.model, name, named[name] * mask)
            expected = self.outputs()
        with self.restoring():
            try:
                lowered = values_without(self.model, {k: v * removed for k, v in group.attributes.items()})
                cut(self.model, {} if group.whole else kept, lowered, group.replace)
                found = self.outputs()
            except Exception as error:  # whatever a user's module raises when its sizes do not fit
                return f"the model does not run without some of its units ({' '.join(str(error).split())[:120]})"
        return difference(found, expected)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Whatever happens to the model's modules inside is undone."""
        tables = ("_parameters", "_buffers", "_modules")
        saved = [(m, dict(m.__dict__), [dict(m.__dict__[t]) for t in tables]) for m in self.model.modules()]
        try:
            yield
        finally:
            for module, state, contents in saved:
                module.__dict__.clear()
                module.__dict__.update(state)
                for table, content in zip(tables, contents, strict=True):
                    module.__dict__[table].clear()
                    module.__dict__[table].update(content)


def difference(found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a cut model's outputs; None when they are the masked model's."""
    if found.shape != expected.shape:
        return f"its removal changes the outputs' shape from {tuple(expected.shape)} to {tuple(found.shape)}"
    off = float((found - expected).abs().max())
    if off <= TOLERANCE.get(expected.dtype, 1e-2) * (1 + float(expected.abs().max())):  # NaN fails too
        return None
    return (
        f"the smaller model's outputs differ from the masked one's by {off:.3g}: something counts its units (a mean or a norm "
        "over them), so removing some changes what the others compute"
    )


def same_as_masked(small: nn.Module, masked: nn.Module, example_inputs: Tensor) -> None:
    """Raises StructureError when ``small`` does not compute what ``masked`` does."""
    expected = Prober(masked, example_inputs).outputs()
    try:
        found = Prober(small, example_inputs).outputs()
    except StructureError as error:
        raise StructureError(f"the pruned model does not run, though the dense one does: {error}") from None
    if (fault := difference(found, expected.to(found.dtype))) is not None:
        raise StructureError(f"the pruned model is not the masked one: {fault}")
