"""What of a model can leave whole, for a structure: a plain table from name to structure, one entry function.

A new structure is one file with a ``STRUCTURE`` in ``prunekit/structure/units``. A user's own comes by import path, an installed
package's by entry point (``prunekit.structures``).
"""

from __future__ import annotations

from torch import nn

from prunekit.batch import Inputs
from prunekit.errors import StructureError
from prunekit.registry import held_by_files
from prunekit.structure import units
from prunekit.structure.cut import Prober
from prunekit.structure.groups import Groups
from prunekit.structure.joined import Structures, nothing_of
from prunekit.structure.structure import Mappings, as_structure

GROUPED = Structures(
    "structure",
    "prunekit.structures",
    as_structure,
    held_by_files(units, "STRUCTURE"),
)
"""Structures whose units are taken out of the tensors, those joined by ``+`` among them; all others are masks."""


def find_groups(structure: str, model: nn.Module, example_inputs: Inputs, attention: Mappings = ()) -> Groups:
    """Every group of units that can be cut; all were cut once on a copy, and computed what the masked model does.

    What cannot be cut is named in ``refused`` with its reason.

    Args:
        structure: a name from ``GROUPED``, ``module:structure``, or several of these joined by ``+``.
        model: left as it is.
        example_inputs: one or two samples, for tracing and checking.
        attention: projections of attention that its names do not give away, see ``prunekit.structure.structure.Mappings``.

    Raises:
        StructureError: nothing can be cut; says why, by layer.
        UsageError: there is no such structure; or ``attention`` names layers that do not exist.
    """
    kind = GROUPED[structure]
    found = kind.find(Prober(model, example_inputs), attention)
    if not found:
        raise StructureError(f"{structure}: {nothing_of(kind, found.refused)}")
    return found


def channel_groups(model: nn.Module, example_inputs: Inputs) -> Groups:
    """``find_groups`` for ``channels``."""
    return find_groups("channels", model, example_inputs)
