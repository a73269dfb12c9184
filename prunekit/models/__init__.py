"""The models that the recipes name; users bring theirs by import path."""

from prunekit.models.digits import digits_cnn

__all__ = ["digits_cnn"]
