"""The one training loop, augmentation, distillation, BatchNorm statistics measured anew."""

from prunekit.training.augment import AUGMENTATIONS, Augment, augmented
from prunekit.training.distill import Distillation
from prunekit.training.loop import TrainOptions, batches_per_epoch, train
from prunekit.training.recalibrate import recalibrate

__all__ = ["AUGMENTATIONS", "Augment", "Distillation", "TrainOptions", "augmented", "batches_per_epoch", "recalibrate", "train"]
