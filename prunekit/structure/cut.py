"""Units taken out of a model for real, from kept indices alone, and the check that this equals masking them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunekit import batch
from prunekit.batch import Inputs
from prunekit.errors import StructureError, quoted
from prunekit.structure.groups import Group, is_skip, kept_indices, shapes_of, slice_masks
from prunekit.structure.replacements import replacement
from prunekit.structure.stand_ins import stand_in
from prunekit.trajectory.bare import named_tensors
from prunekit.trajectory.copies import copied

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of float64 too, since models of transformers compute norms and rotary angles in single precision whatever they are in."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Cut:
    """What leaves a model for real: a plan makes it, a manifest saves it, and it is carried out here.

    Attributes:
        kept: ``<param>@<axis>`` -> kept indices on that axis, ascending; of axes that lose something.
        attributes: ``<module>:<attribute>`` -> its new value (numbers of heads, of convolution groups).
        replaced: module -> kind of what takes its place, see ``prunekit.structure.replacements``.
    """

    kept: Mapping[str, Tensor]
    attributes: Mapping[str, int] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    def carry_out(self, model: nn.Module) -> None:
        """Makes ``model`` smaller in place.

        Raises:
            ValueError: something does not fit this model.
        """
        for name, kind in self.replaced.items():
            _place(model, name, replacement(model.get_submodule(name), kind))
        for key, value in self.attributes.items():
            name, attribute = key.rsplit(":", 1)
            module = model.get_submodule(name)
            old = getattr(module, attribute, None)
            if isinstance(old, bool) or not isinstance(old, int) or not 1 <= value <= old:
                raise ValueError(f"{name}.{attribute} is {old!r} and cannot become {value!r}")
            setattr(module, attribute, value)
        named = named_tensors(model)
        touched: dict[str, Tensor] = {}
        for key, indices in self.kept.items():
            name, axis = key.rsplit("@", 1)
            tensor = touched[name] if name in touched else named[name].detach()
            touched[name] = tensor.index_select(int(axis), indices.to(tensor.device))
        for name, tensor in touched.items():
            put(model, name, tensor)
        for owner in {name.rpartition(".")[0].partition(".parametrizations.")[0] for name in touched}:
            _resize(model.get_submodule(owner))


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
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.embedding_dim = module.weight.shape[1]
    elif type(module).__name__ == "Conv1D":  # of transformers
        for name, axis in (("nx", 0), ("nf", 1)):
            if hasattr(module, name):
                setattr(module, name, module.weight.shape[axis])  # type: ignore[index]


class Prober:
    """Checks groups on a private copy of a model: on the CPU, float64 where the model takes it, evaluation mode.

    Args:
        example_inputs: one or two samples, as the model is called (``prunekit.batch``); every run gets a copy of its own, so
            that a cache that a run fills is empty for the next one.

    Raises:
        StructureError: the model does not run on them.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs) -> None:
        given = batch.mapped(example_inputs, lambda tensor: tensor.detach().cpu())
        self.model = copied(model).cpu().eval().requires_grad_(False).double()
        self._inputs = batch.float64(given)
        if self._runs() is not None:  # it may cast to float32 somewhere inside
            self.model, self._inputs = copied(model).cpu().eval().requires_grad_(False), given
            if (reason := self._runs()) is not None:
                raise StructureError(f"the model does not run on the example inputs {_shown(given)}: {reason}")
        self.shapes = shapes_of(self.model)

    def _runs(self) -> str | None:
        try:
            found = self.outputs()
        except Exception as error:  # the user's own model
            return quoted(error, 120)
        return None if found else "its answer holds no tensor"

    @property
    def inputs(self) -> Inputs:
        """A copy of the example inputs."""
        return copy.deepcopy(self._inputs)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Every tensor of the model's answer."""
        return batch.answers(batch.call(self.model, self.inputs))

    def faults(self, groups: Sequence[Group]) -> dict[str, str]:
        """Why groups cannot be cut, by name; those without a word can.

        All are tried together; where that fails, each half by itself, so that few faults cost few runs.
        """
        single = {g.name: "all of its channels can only go together" for g in groups if g.size == 1 and not g.whole}
        single |= {g.name: f"{g.least} of its {g.size} must stay" for g in groups if g.size > 1 and g.size <= g.least}
        found: dict[str, str] = {}
        waiting = [[group for group in groups if group.name not in single]]
        while waiting:
            some = waiting.pop()
            if not some or (reason := self.fault(some)) is None:
                continue
            if len(some) == 1:
                found[some[0].name] = reason
            else:
                waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
        return single | {group.name: found[group.name] for group in groups if group.name in found}

    @torch.no_grad()
    def fault(self, groups: Sequence[Group]) -> str | None:
        """Why some units of all ``groups`` cannot go; None when the model without them equals the masked one."""
        keep = {g.name: torch.zeros(1, dtype=torch.bool) if g.whole else _kept(g) for g in groups}
        index = {key: where for group in groups for key, where in group.index().items()}
        kept = kept_indices(index, keep, self.shapes)
        lowered: dict[str, int] = {}
        for group in groups:
            for key, each in group.attributes.items():
                lowered[key] = lowered.get(key, 0) + each * int((~keep[group.name]).sum())
        replaced = {name: kind for group in groups for name, kind in group.replace.items()}
        gone = tuple(f"{name}{mark}" for name, kind in replaced.items() if is_skip(kind) for mark in ".:")
        with self.restoring():
            named = named_tensors(self.model)
            for name, mask in slice_masks(kept, self.shapes).items():
                put(self.model, name, named[name] * mask)
            stand_in(self.model, {name: (kind, keep[g.name]) for g in groups for name, kind in g.masked.items()})
            try:
                expected = self.outputs()
            finally:
                stand_in(self.model, {})
        with self.restoring():
            try:
                Cut(
                    {key: where for key, where in kept.items() if not key.startswith(gone)},
                    values_without(self.model, {key: n for key, n in lowered.items() if not key.startswith(gone)}),
                    {name: kind for name, kind in replaced.items() if not name.startswith(gone)},
                ).carry_out(self.model)
                found = self.outputs()
            except Exception:  # whatever a user's module raises when its sizes do not fit
                return "the model does not run without some of its units: its code counts on how many there are"
        return difference(found, expected)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Whatever happens to the model's modules inside is undone."""
        tables = ("_parameters", "_buffers", "_modules")
        saved = [(m, dict(m.__dict__), [dict(m.__dict__[t]) for t in tables]) for m in self.model.modules()]
        flat = [(m, list(m._flat_weights)) for m in self.model.modules() if isinstance(m, nn.RNNBase)]
        try:
            yield
        finally:
            for module, state, contents in saved:
                module.__dict__.clear()
                module.__dict__.update(state)
                for table, content in zip(tables, contents, strict=True):
                    module.__dict__[table].clear()
                    module.__dict__[table].update(content)
            for module, weights in flat:
                module._flat_weights = weights


def _kept(group: Group) -> Tensor:
    """Units that stay in a check, ``(units,)``: as many as may stay of the group."""
    keep = ~_some(group.size)
    more = max(0, group.least - int(keep.sum())) or -int(keep.sum()) % group.multiple
    keep[keep.logical_not().nonzero().flatten()[:more]] = True
    return keep


def _some(size: int) -> Tensor:
    """Units that go in a check, ``(size,)``: an odd number, without a period that would suit some shape by chance."""
    at = torch.arange(size)
    gone: Tensor = (3 * at * at + at) % 7 < 3
    if gone.all():
        gone[-1] = False
    if int(gone.sum()) % 2 == 0:
        if int((~gone).sum()) > 1:
            gone[(~gone).nonzero()[0]] = True
        else:
            gone[gone.nonzero()[0]] = False
    return gone


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with a cut model's outputs; None when they are the masked model's."""
    if len(found) != len(expected):
        return f"its removal changes how many tensors the model gives, from {len(expected)} to {len(found)}"
    for now, before in zip(found, expected, strict=True):
        if now.shape != before.shape:
            return f"its removal changes the outputs' shape from {tuple(before.shape)} to {tuple(now.shape)}"
        if not now.is_floating_point():
            if not torch.equal(now, before):
                return "its removal changes whole numbers that the model gives"
            continue
        before = before.to(now.dtype)
        off = float(torch.where(now == before, 0, now - before).abs().max()) if now.numel() else 0.0  # infinities may agree
        most = float(before[before.isfinite()].abs().max()) if before.isfinite().any() else 0.0
        if not off <= TOLERANCE.get(before.dtype, 1e-2) * (1 + most):  # NaN fails too
            return (
                f"the smaller model's outputs differ from the masked one's by {off:.3g}: something counts its units (a mean or "
                "a norm over them), so removing some changes what the others compute"
            )
    return None


def same_as_masked(small: nn.Module, masked: nn.Module, example_inputs: Inputs) -> None:
    """Raises StructureError when ``small`` does not compute what ``masked`` does."""
    expected = Prober(masked, example_inputs).outputs()
    try:
        found = Prober(small, example_inputs).outputs()
    except StructureError as error:
        raise StructureError(f"the pruned model does not run, though the dense one does: {error}") from None
    if (fault := difference(found, expected)) is not None:
        raise StructureError(f"the pruned model is not the masked one: {fault}")


def _shown(inputs: Inputs) -> str:
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} of {inputs.dtype}"
    return batch.described(inputs)
