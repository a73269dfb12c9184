"""Which parameters may be pruned, and which of their slices go together."""

from prunekit.structure.find import channel_groups, find_groups
from prunekit.structure.groups import Group, Groups
from prunekit.structure.names import (
    GROUPED,
    KNOWN,
    STRUCTURES,
    Pattern,
    asked_sparsity,
    check_structure,
    implied_sparsity,
    pattern_of,
)
from prunekit.structure.prunable import kept_layers, prunable_parameters

ChannelGroup = Group

__all__ = [
    "GROUPED", "KNOWN", "STRUCTURES", "ChannelGroup", "Group", "Groups", "Pattern", "asked_sparsity", "channel_groups",
    "check_structure", "find_groups", "implied_sparsity", "kept_layers", "pattern_of", "prunable_parameters",
]  # fmt: skip
