"""The one training loop."""

from prunekit.training.loop import train

__all__ = ["train"]
