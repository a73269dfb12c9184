"""Which parameters may be pruned, and which of their slices go together."""

from prunekit.structure.channels import ChannelGroup, channel_groups
from prunekit.structure.prunable import prunable_parameters

__all__ = ["ChannelGroup", "channel_groups", "prunable_parameters"]
