"""The data that the recipes name; users bring theirs by import path."""

from prunekit.data.cifar import cifar2
from prunekit.data.digits import digits
from prunekit.data.modadd import modadd
from prunekit.data.samples import EVAL_BATCH, Samples, drawn, learn_and_accept
from prunekit.data.splits import SPLITS, Split, as_splits
from prunekit.data.stdlib import stdlib

__all__ = [
    "EVAL_BATCH", "SPLITS", "Samples", "Split", "as_splits", "cifar2", "digits", "drawn", "learn_and_accept", "modadd", "stdlib",
]  # fmt: skip
