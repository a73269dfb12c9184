"""Training a pruned model on, its masks held, its steps recorded as a child of the dense model's trajectory."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import ranks
from prunekit.apply import apply_masks
from prunekit.errors import UsageError
from prunekit.plan import Plan
from prunekit.remote import Remote, placed
from prunekit.steps.held import Held
from prunekit.steps.low_rank import Adapted, LowRank
from prunekit.steps.rate import ByDivergence, ByLoss, find_rate
from prunekit.training.line_search import BATCHES
from prunekit.training.loop import TrainOptions, train
from prunekit.trajectory import Polygon, Recorder, Trajectory, parent_facts


@dataclass(frozen=True)
class Finetuning(TrainOptions):
    """How to train a pruned model on; ``epochs`` are of one round.

    Attributes:
        optimizer: makes the optimizer for a model.
        scheduler: ``(optimizer, steps)`` -> a schedule that is stepped after every step; None for a constant rate.
        record: options of the ``Recorder`` (``every``, ``second_moments``); with ``lora`` only ``every``.
        rate: how far from its aim a model is: every round begins at the rate that a search along Adam's direction finds by it
            (``prunekit.steps.rate.find_rate``). None leaves it to the optimizer.
        lora: rank of the matrices that are trained in the place of the layers' weights (``prunekit.steps.low_rank``), with
            everything else held fixed; ``optimizer`` gets a module of them alone. None trains the whole model.
    """

    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], Any] = lambda optimizer, steps: None
    _: KW_ONLY
    record: Mapping[str, Any] = field(default_factory=dict)
    rate: ByDivergence | ByLoss | None = None
    lora: int | None = None

    def adapted(self, model: nn.Module, prunable: Sequence[str] | None) -> Adapted | None:
        """Which of the model's weights ``lora`` adapts; None without it.

        Raises:
            UsageError: none can be, see ``Adapted.of``; or what ``record`` asks for is about an optimizer of the weights.
        """
        if self.lora is None:
            return None
        if foreign := sorted(key for key, value in self.record.items() if key != "every" and value not in (False, 0, "whole")):
            raise UsageError(
                f"record: {foreign[0]} is about an optimizer's steps on weights, and lora trains others; leave it out"
            )
        return Adapted.of(model, self.lora, prunable)


def finetune(
    model: nn.Module,
    plan: Plan,
    how: Finetuning,
    folder: str | Path | None = None,
    parent: Trajectory | None = None,
) -> list[float]:
    """Trains ``model`` on in place with everything that ``plan`` removes held at exactly 0.

    For channels too it is the dense-shaped model that is trained: masked, it computes what the cut one computes, and its
    steps are in the coordinates of the path. Cut it afterwards (``prunekit.search.cut``).

    Args:
        model: the dense architecture; what the plan removes is zeroed first.
        folder: where its steps are recorded (needs ``parent``); None to record nothing.
        parent: the dense model's trajectory, which the recording names and which stays as it is.

    Returns:
        each epoch's mean training loss.

    Raises:
        UsageError: there is no parent to a recording, or ``how.lora`` does not fit the model.
        NonFiniteError: the loss became NaN or Inf.
        ArtifactError: ``folder`` holds a trajectory already, or the disk is full.

    Example:
        >>> import torch
        >>> from prunekit import Finetuning, Trajectory, finetune, make_plan, score
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = make_plan(score(Trajectory.of(model), model, criterion="magnitude"), model, sparsity=0.5)
        >>> x = torch.randn(64, 4)
        >>> y = x[:, 0].gt(0).long()
        >>> how = Finetuning(lambda at: (x[at], y[at]), 64, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), epochs=2)
        >>> len(finetune(model, plan, how))  # each epoch's mean loss
        2
        >>> int((model[0].weight == 0).sum() + (model[2].weight == 0).sum())
        24
    """
    if folder is not None and parent is None:
        raise UsageError("finetune: a recording needs its parent, the dense model's trajectory")
    facts = parent_facts(parent) if parent is not None else {}
    with Tuner(model, plan.masks(), how, folder, facts, plan.provenance.get("prunable")) as tuner:
        return tuner.run()


class Tuner(Held):
    """Fine-tuning in progress: masks held (they may shrink on the way), steps recorded, one optimizer throughout.

    Args:
        model: trained in place.
        masks: True stays; applied on entering.
        how: makes the optimizer.
        folder: of the recording, made anew, of several ranks the first one's; None for none.
        provenance: of the recording.
        prunable: names of what ``how.lora`` may adapt; None for the weights of all layers.

    Attributes:
        rates: at which every run began.

    Raises:
        UsageError: ``folder`` is an address of a store, or ``how.lora`` does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        how: Finetuning,
        folder: str | Path | None,
        provenance: Mapping[str, Any],
        prunable: Sequence[str] | None = None,
    ) -> None:
        self.how = how
        adapted = how.adapted(model, prunable)
        place = None if folder is None else placed(folder)
        if isinstance(place, Remote):
            raise UsageError(f"{place}: a fine-tuning is recorded in a folder of this machine; copy it to the store in the end")
        model.to(how.device)
        low_rank = None if adapted is None else LowRank(model, adapted, how.seed)
        self.optimizer = how.optimizer(model if low_rank is None else low_rank)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rates: list[float] = []
        recorder: Recorder | Polygon | None = None
        self._folder: Path | None = None
        if place is not None:
            self._folder = Path(ranks.from_first(lambda: str(place.absolute())))
            if low_rank is not None:  # its steps are no optimizer's on the weights, so the states alone are recorded
                recorder = Polygon(self._folder, model, provenance, every=how.record.get("every", 1))
            else:
                options = {"snapshot_every": 0, **how.record, **({"alone": False} if ranks.size() > 1 else {})}
                recorder = Recorder(self._folder, model, self.optimizer, provenance, **options)
        super().__init__(model, masks, self.optimizer, recorder, low_rank)

    def __enter__(self) -> Tuner:
        super().__enter__()
        return self

    def run(
        self,
        seed: int | None = None,
        *,
        epochs: int | None = None,
        begin: int = 0,
        end: int | None = None,
        after_step: Callable[[int], None] = lambda steps: None,
        stage: str = "fine-tune",
    ) -> list[float]:
        """Trains through the epochs once, with the schedule from its beginning; momenta go on from an earlier run.

        Args:
            epochs: instead of ``how``'s.
            begin, end: only these steps, of the order of samples and of the schedule as of all.
        """
        how = self.how if epochs is None else replace(self.how, epochs=epochs)
        with nullcontext() if self.low_rank is None else self.low_rank.alone():
            return self._run(how, seed, begin, end, after_step, stage)

    def _run(
        self, how: Finetuning, seed: int | None, begin: int, end: int | None, after_step: Callable[[int], None], stage: str
    ) -> list[float]:
        rates = self._rates if how.rate is None else [self._found(how, how.rate)] * len(self._rates)
        self.rates.append(rates[0])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            group.pop("initial_lr", None)
        scheduler = how.scheduler(self.optimizer, how.steps)
        if scheduler is not None and begin:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a schedule that moves before its optimizer: it is meant
                for _ in range(begin):
                    scheduler.step()
        how = how if seed is None else replace(how, seed=seed)
        recorder = self._recorder
        if isinstance(recorder, Polygon):
            after_step, recorder = partial(_in_turn, recorder, after_step), None
        options: dict[str, Any] = {"recorder": recorder, "begin": begin, "end": end, "after_step": after_step, "stage": stage}
        return train(self.model, self.optimizer, scheduler, how, **options)

    def _found(self, how: Finetuning, far: ByDivergence | ByLoss) -> float:
        """The rate that a search along Adam's direction finds."""

        def few(watcher: torch.optim.Optimizer) -> None:
            train(self.model, watcher, None, how, begin=0, end=BATCHES, stage="find a rate")

        def moved() -> None:
            if self.low_rank is not None:
                self.low_rank.follow()
            apply_masks(self.model, self._masks)

        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        return find_rate(self.model, trained, few, moved, far)

    def so_far(self) -> Trajectory | None:
        """What is recorded by now, also after it was left, opened by all ranks; None when nothing is."""
        if self._folder is None:
            return None
        if self._recorder is not None:
            self._recorder.flush()
        ranks.wait()
        return Trajectory(self._folder)


def _in_turn(polygon: Polygon, after_step: Callable[[int], None], steps: int) -> None:
    polygon.step()
    after_step(steps)


def forget(folder: str | Path) -> None:
    """Removes the recording of a round whose weights were rewound: it is no part of the final model's path."""
    shutil.rmtree(folder, ignore_errors=True)
