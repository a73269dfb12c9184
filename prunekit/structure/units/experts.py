"""Experts of a mixture, each with its row of the router: held in tensors whose first axis is the expert."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.structure.cut import Prober
from prunekit.structure.families import experts_of
from prunekit.structure.groups import ROUTER, Group, Groups
from prunekit.structure.stand_ins import COUNTS
from prunekit.structure.structure import Mappings, Structure, checked

CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k")
"""What routers, or the modules around them, call the number of experts that a token goes to."""


def expert_units(prober: Prober, attention: Mappings) -> Groups:
    """Experts with their rows of the router. All were cut once."""
    return Groups(*checked(prober, *expert_groups(prober.model, attention)))


STRUCTURE = Structure(
    expert_units,
    "experts of a mixture with their rows of the router; as many as a token goes to stay",
    nothing="no mixture of experts was found (a router beside a module whose tensors hold all experts); "
    "name both in the recipe's structure.families",
    sized=True,
    counted=True,
)


def expert_groups(model: nn.Module, given: Mappings = ()) -> tuple[list[Group], dict[str, str]]:
    """A group for every mixture, not yet checked by running, and what was refused, with reasons."""
    found: list[Group] = []
    refused: dict[str, str] = {}
    for name, module, router, bank in experts_of(model, given):
        held, chooser = model.get_submodule(bank), model.get_submodule(router)
        sizes = {len(parameter) for parameter in held.parameters(recurse=False) if parameter.dim() > 1}
        if len(sizes) != 1 or (
            next(held.children(), None) is not None and any(True for m in held.children() for _ in m.parameters())
        ):
            refused[name] = f"{bank} does not hold its experts in tensors whose first axis is the expert"
            continue
        experts = sizes.pop()
        members = {}
        for path, owner in ((bank, held), (router, chooser)):
            for short, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                if tensor.dim() and len(tensor) == experts:
                    members[f"{path}.{short}@0"] = torch.arange(experts).view(-1, 1)
        if not any(key.startswith(f"{router}.") for key in members):
            refused[name] = f"{router} has no row for each of the {experts} experts of {bank}"
            continue
        places = ((name, module), (router, chooser), (bank, held))
        attributes = {
            f"{path}:{count}": 1
            for path, owner in places
            for count in COUNTS
            if count != "out_features" and vars(owner).get(count) == experts
        }
        chosen = [value for _, owner in places for each in CHOSEN if isinstance(value := vars(owner).get(each), int)]
        found.append(Group(name, members, attributes, masked={router: ROUTER}, least=max(chosen, default=1)))
    return found, refused
