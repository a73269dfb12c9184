"""The one training loop, distillation, BatchNorm statistics measured anew."""

from prunekit.training.distill import Distillation
from prunekit.training.loop import batches_per_epoch, train
from prunekit.training.recalibrate import recalibrate

__all__ = ["Distillation", "batches_per_epoch", "recalibrate", "train"]
