"""Which parameters may be pruned, and which of their slices go together."""

from prunekit.structure.find import GROUPED, channel_groups, find_groups
from prunekit.structure.groups import Group, Groups
from prunekit.structure.names import (
    KNOWN,
    STRUCTURES,
    Pattern,
    asked_sparsity,
    check_structure,
    implied_sparsity,
    pattern_of,
    takes_sizes,
)
from prunekit.structure.prunable import kept_layers, prunable_parameters
from prunekit.structure.structure import Mappings, Structure

ChannelGroup = Group

__all__ = [
    "GROUPED", "KNOWN", "STRUCTURES", "ChannelGroup", "Group", "Groups", "Mappings", "Pattern", "Structure", "asked_sparsity",
    "channel_groups", "check_structure", "find_groups", "implied_sparsity", "kept_layers", "pattern_of", "prunable_parameters",
    "takes_sizes",
]  # fmt: skip
