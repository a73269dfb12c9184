"""Distillation: the dense model's outputs as soft labels beside the true ones (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from prunekit.batch import Inputs, Labels
from prunekit.task import Classification, Task
from prunekit.task.evaluation import run


@dataclass(frozen=True)
class Distillation:
    """``(1 - weight) × loss + weight × T² KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over the batch.

    ``T²`` keeps the soft term's gradients as large as the hard one's, whatever the temperature (section 2 of the paper). For
    other tasks than classes the task's own divergence takes KL's place (of numbers ``T`` cancels).

    Attributes:
        teacher: left as it is; run in evaluation mode.
        temperature: ``T`` > 0; the higher, the more the wrong classes' proportions count.
        weight: of the soft labels, in (0, 1].
        task: which of the models' answers counts, and what divergence is.
    """

    teacher: nn.Module
    temperature: float = 4.0
    weight: float = 0.5
    task: Task = field(default_factory=Classification)

    def __call__(self, hard: Tensor, outputs: Tensor, x: Inputs, y: Labels = None, share: float = 1.0) -> Tensor:
        """The joint loss from the ``hard`` one.

        Args:
            outputs: the student's outputs that count.
            x, y: inputs and labels that they belong to.
            share: what these samples' mean counts in the batch's.
        """
        t = self.temperature
        reference = self.task.reference(run(self.teacher, (x, y), self.task) / t)
        divergence = self.task.divergence(outputs / t, (reference, y)).mean()
        return (1 - self.weight) * hard + self.weight * t**2 * share * divergence
