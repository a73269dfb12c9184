"""Distillation: the dense model's outputs as soft labels beside the true ones (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Distillation:
    """``(1 - weight) × loss + weight × T² KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over the batch.

    ``T²`` keeps the soft term's gradients as large as the hard one's, whatever the temperature (section 2 of the paper).

    Attributes:
        teacher: left as it is; run in evaluation mode.
        temperature: ``T`` > 0; the higher, the more the wrong classes' proportions count.
        weight: of the soft labels, in (0, 1].
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.5

    def __call__(self, hard: Tensor, outputs: Tensor, x: Tensor) -> Tensor:
        """The joint loss from the ``hard`` one.

        Args:
            outputs: the student's logits, classes on the last axis.
            x: the inputs that they belong to.
        """
        training = self.teacher.training
        with torch.no_grad():
            soft = self.teacher.eval()(x)
        self.teacher.train(training)
        t = self.temperature
        student, teacher = (F.log_softmax(z.reshape(-1, z.shape[-1]) / t, -1) for z in (outputs, soft))
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - self.weight) * hard + self.weight * t**2 * divergence
