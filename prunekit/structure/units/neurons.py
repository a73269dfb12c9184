"""Neurons of MLPs, in every expert the same ones: known by the names of their layers, else read from one run of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.errors import StructureError
from prunekit.structure.cut import Prober
from prunekit.structure.families import below, experts_of, joined, rows
from prunekit.structure.groups import Group, Groups, tied_names
from prunekit.structure.structure import Mappings, Structure, checked
from prunekit.structure.units.heads import attention_groups, axis_of, is_linear, rows_of, sizes_of

NEURONS = ("intermediate_dim", "intermediate_size", "ffn_dim", "expert_dim", "moe_intermediate_size")
"""What modules that hold experts call the number of their neurons."""


ALIGNED = 8
"""torch's products of grouped matrices take widths of whole 16 bytes: of 8 numbers in two bytes each."""


def neuron_units(prober: Prober, attention: Mappings) -> Groups:
    """Neurons of MLPs. All were cut once."""
    named, refused = neuron_groups(prober.model, attention)
    found, refused = checked(prober, named, refused)
    if found or refused:
        return Groups(found, refused)
    from prunekit.structure.units.channels import traced_groups  # which takes its named neurons from here

    projections = attention_groups(prober.model, attention)[2]
    try:
        traced, refused = traced_groups(prober.model, prober.inputs, projections)
    except StructureError as error:
        return Groups([], {"neurons": str(error).removeprefix("channels: ")})
    return Groups(*checked(prober, [group for group in traced if _of_linear_layers(prober.model, group)], refused))


STRUCTURE = Structure(
    neuron_units,
    "neurons of MLPs",
    nothing="no MLP was found; name its layers in the recipe's structure.families",
    sized=True,
)


def neuron_groups(model: nn.Module, given: Mappings = ()) -> tuple[list[Group], dict[str, str]]:
    """Groups of neurons by the names of ``prunekit.structure.families``, not yet checked by running, and what was refused."""
    found: dict[str, Group] = {}
    refused: dict[str, str] = {}
    known = [mlp for row in rows(given) for mlp in row.mlps]
    made: list[tuple[str, Group | str]] = []
    for name, module in model.named_modules():
        for ups, down in known:
            if all(is_linear(below(module, layer)) for layer in (*ups, down)):
                made.append(_of_mlp(model, [joined(name, up) for up in ups], joined(name, down)))
                break
    made += [_of_experts(model, bank) for _, _, _, bank in experts_of(model, given)]
    tied = tied_names(model)
    for name, group in made:
        weights = [] if isinstance(group, str) else [key.rsplit("@", 1)[0] for key in group.members]
        bound = next((weight for weight in weights if weight in tied), None)
        if isinstance(group, str):
            refused[name] = group
        elif bound is not None:
            refused[name] = f"{bound} is tied to {tied[bound]}; surgery would untie them"
        else:
            found[name] = group
    return list(found.values()), refused


def _of_mlp(model: nn.Module, ups: list[str], down: str) -> tuple[str, Group | str]:
    """Neurons of linear layers, or why not; a layer twice as wide as what reads it holds gates before what they gate."""
    _, neurons = sizes_of(model, down)
    members: dict[str, Tensor] = {}
    for up in reversed(ups):
        outputs, _ = sizes_of(model, up)
        if outputs not in (neurons, 2 * neurons):
            return ups[-1], f"{up} has {outputs} outputs, {down} reads {neurons}"
        members |= rows_of(model, up, torch.arange(outputs).view(-1, neurons).t().contiguous())
    return ups[-1], Group(ups[-1], members | {axis_of(model, down, outputs=False): torch.arange(neurons).view(-1, 1)})


def _of_experts(model: nn.Module, bank: str) -> tuple[str, Group | str]:
    """The same neurons of every expert, since one tensor holds them all; or why not."""
    module = model.get_submodule(bank)
    held = dict(module.named_parameters())
    if held.keys() != {"gate_up_proj", "down_proj"} or {tensor.dim() for tensor in held.values()} != {3}:
        return bank, "its experts are not held as gate_up_proj and down_proj, without biases"
    up, down = held["gate_up_proj"], held["down_proj"]
    neurons = down.shape[2]
    if up.shape[1] != 2 * neurons or up.shape[2] != down.shape[1]:
        return bank, f"its gate_up_proj is {tuple(up.shape)}, its down_proj {tuple(down.shape)}: not (experts, outputs, inputs)"
    members = {
        f"{bank}.gate_up_proj@1": torch.arange(2 * neurons).view(2, neurons).t().contiguous(),
        f"{bank}.down_proj@2": torch.arange(neurons).view(-1, 1),
    }
    counted = {f"{bank}:{name}": 1 for name in NEURONS if vars(module).get(name) == neurons}
    return bank, Group(bank, members, counted, multiple=ALIGNED)


def _of_linear_layers(model: nn.Module, group: Group) -> bool:
    """Whether all that leaves with its units is of linear layers."""
    return all(is_linear(model.get_submodule(key.rsplit("@", 1)[0].rpartition(".")[0])) for key in group.members)
