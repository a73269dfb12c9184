"""What prunekit does inside a training loop of somebody else's: record the path, hold masks, prune on the way, score online."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prunekit.apply.masks import masks_for
from prunekit.criteria import OnlineInfluence, model_digest
from prunekit.errors import Note, UsageError
from prunekit.integrations.clipping import Clipping
from prunekit.integrations.order import Order
from prunekit.plan import Plan
from prunekit.remote import placed
from prunekit.steps import Planner, Schedule
from prunekit.steps.held import Held
from prunekit.steps.schedule import check_steps
from prunekit.trajectory import Recorder, Trajectory, parent_facts
from prunekit.trajectory.bare import bare, bare_optimizers
from prunekit.trajectory.describe import skipped
from prunekit.trajectory.shards import is_spread


@dataclass(frozen=True)
class Gradual:
    """Prune while training: schedule ``gradual`` of ``prunekit.Schedule``.

    Attributes:
        planner: of the model as it is when training begins.
        sparsity: what holds at the end.
        rounds: prunings.
        every: optimizer steps between two of them; None spreads them over the first half of the steps.

    Example:
        >>> import torch
        >>> from prunekit import Planner, Trajectory
        >>> from prunekit.integrations import Gradual
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> Gradual(Planner.of(Trajectory.of(model), model, criterion="magnitude"), 0.5, rounds=4).schedule.name
        'gradual'
    """

    planner: Planner
    sparsity: float
    rounds: int = 5
    every: int | None = None

    @property
    def schedule(self) -> Schedule:
        return Schedule("gradual", rounds=self.rounds, every=self.every)


class Recording:
    """What is to be done in a loop that a library runs; its callback or wrapper calls ``begin``, ``batch`` and ``end``.

    Args:
        folder: where the path is recorded, an address of a store too; None records nothing.
        plan: what it removes is held at exactly 0; a ``Gradual`` prunes on the way.
        parent: the dense model's trajectory, which the recording names, as ``prunekit.finetune`` does.
        every, states, second_moments: as in ``Recorder``.
        online: makes the ``OnlineInfluence`` that adds scores up meanwhile, from model and optimizer.
        provenance: facts to keep with the recording; JSON values.

    Attributes:
        plan: the plan that holds, of a ``Gradual`` the last one; None before its first pruning.
        online: the ``OnlineInfluence``, once training has begun.

    Raises:
        UsageError: there is nothing to do.

    Example:
        >>> import torch
        >>> from prunekit import Trajectory
        >>> from prunekit.integrations import Recording
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recording = Recording(getfixture("tmp_path") / "trajectory", every=2)
        >>> recording.begin(model, optimizer)  # a callback does this where training begins
        >>> for _ in range(4):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     recording.batch([0])
        ...     optimizer.step()
        >>> recording.end()
        >>> Trajectory(getfixture("tmp_path") / "trajectory").kept == {0, 2, 4}
        True
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        plan: Plan | Gradual | None = None,
        parent: Trajectory | None = None,
        every: int = 1,
        states: Literal["whole", "half"] = "whole",
        second_moments: bool = False,
        online: Callable[[nn.Module, torch.optim.Optimizer], OnlineInfluence] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if folder is None and plan is None and online is None:
            raise UsageError("Recording has nothing to do; give a folder to record into, a plan to hold, or online")
        if parent is not None and folder is None:
            raise UsageError("Recording: parent is named by a recording; give the folder that it goes to")
        self.folder = None if folder is None else placed(folder)
        self.plan = plan if isinstance(plan, Plan) else None
        self.online: OnlineInfluence | None = None
        self._gradual = plan if isinstance(plan, Gradual) else None
        self._facts = {**({} if parent is None else parent_facts(parent)), **(provenance or {})}
        self._options: dict[str, Any] = {"every": every, "states": states, "second_moments": second_moments}
        self._online = online
        self._stack: ExitStack | None = None
        self._recorder: Recorder | None = None
        self._order: Order | None = None

    @property
    def running(self) -> bool:
        """Whether it is in a loop now."""
        return self._stack is not None

    @property
    def steps(self) -> int:
        """Optimizer steps that the recording holds, those of an earlier run that it goes on with included."""
        return 0 if self._recorder is None else self._recorder.steps

    def begin(
        self,
        model: nn.Module,
        optimizers: Any,
        *,
        loader: Any = None,
        taken: int = 0,
        steps: int | None = None,
        processes: int = 1,
        main: bool = True,
        scale: Callable[[], float] = lambda: 1.0,
        clips: bool = True,
    ) -> None:
        """Training begins: everything that it needs is built, and where it goes on everything is put back.

        Args:
            model, optimizers: in wrappers or without; several optimizers as a list.
            loader: the loader that the loop iterates over.
            taken: the loop goes on after so many steps, and so does the recording in ``folder``, if there is one.
            steps: how many optimizer steps the whole training has, for a ``Gradual``.
            processes: how many train together; ``main`` is the one that writes.
            scale: the present factor of a GradScaler.
            clips: whether the loop may clip the gradient without a word (``clipped``).

        Raises:
            UsageError: what was asked for cannot be done in this loop.
            ArtifactError: ``folder`` holds a trajectory that this training does not go on with.
        """
        self._cut_off()
        several, inside = bare_optimizers(optimizers), bare(model)
        self._check(len(several), taken, steps, processes)
        self._refuse_sharded(inside)
        self._recorder = self._made(model, several, taken, processes) if self.folder is not None else None
        held = Held(inside, {} if self.plan is None else masks_for(inside, self.plan), several, self._recorder)
        with ExitStack() as stack:
            stack.enter_context(held)
            if self._online is not None and main:
                self.online = stack.enter_context(self._online(inside, several[0]))
            if self._gradual is not None:
                hook = several[0].register_step_post_hook(self._pruning(self._gradual, held, steps or 0))
                stack.callback(hook.remove)
            self._listen(loader, stack)
            if self._recorder is not None and clips:
                self._look_at_clipping(self._recorder, inside, several, processes, scale, stack)
            atexit.register(self._cut_off)  # Trainer tells no callback of an error
            stack.callback(atexit.unregister, self._cut_off)
            self._stack = stack.pop_all()

    def batch(self, indices: list[int] | None, weight: float | None = None) -> None:
        """The samples of the coming micro-batch in this process; None where they are not known."""
        if self._recorder is not None and self.running and indices is not None:
            self._recorder.batch(indices, weight=weight)

    def numbered(self, number: int, weight: float | None = None) -> None:
        """The coming micro-batch is batch ``number`` of this epoch of the loader."""
        if self._order is not None:
            self.batch(self._order.batch(number), weight)

    def listen(self) -> None:
        """An epoch begins: the loader's sampler may have been set anew."""
        if self._order is not None:
            self._order.listen()

    def clipped(self, norm: float | torch.Tensor, max_norm: float) -> None:
        """The coming step's gradient, of norm ``norm``, is clipped to ``max_norm`` as ``clip_grad_norm_`` does it."""
        if self._recorder is not None and self.running:
            self._recorder.gradient_scale(min(1.0, max_norm / (float(norm) + 1e-6)))

    def clipping_unknown(self, why: str) -> None:
        """Gradients are clipped, and by which factor is not known."""
        if self._recorder is not None and self._recorder.first:
            warnings.warn(
                f"Recording: the factor of clipping is not noted ({why}); explanations by training samples and replaying take "
                "gradients as not clipped, everything else is right",
                Note,
                stacklevel=3,
            )

    def parts_unknown(self, why: str) -> None:
        """The micro-batches of a step may count unequally, and by how much is not known."""
        if self._recorder is not None and self._recorder.first:
            warnings.warn(
                f"Recording: the micro-batches of a step are noted as equal parts of it ({why}); explanations by training "
                "samples and replaying are right only where they are, everything else is right",
                Note,
                stacklevel=3,
            )

    def end(self, error: BaseException | None = None) -> None:
        """Training ends. With an error (Ctrl-C too) the recording is cut off: it opens up to its last whole step."""
        stack, self._stack = self._stack, None
        self._order = None
        if stack is not None:
            stack.__exit__(None if error is None else type(error), error, None)

    def _cut_off(self) -> None:
        self.end(InterruptedError("the loop did not come to its end"))

    # -- parts of begin ------------------------------------------------------------------------------------------

    def _check(self, optimizers: int, taken: int, steps: int | None, processes: int) -> None:
        if self._online is not None and (optimizers > 1 or processes > 1 or taken):
            raise UsageError("online scores follow one optimizer in one process from its first step; record, and score later")
        if self._gradual is None:
            return
        if processes > 1 or taken:
            raise UsageError(
                "pruning while training (Gradual) is for one process and a whole training, not one of several processes or one "
                "that goes on from a checkpoint; prune first and hold the plan"
            )
        if optimizers > 1:
            raise UsageError(f"pruning while training (Gradual) counts the steps of one optimizer, and there are {optimizers}")
        self._gradual.schedule.check(steps)
        check_steps(self._gradual.planner.structure, "gradual")
        if self._gradual.planner.of_path and self.folder is None:
            raise UsageError("the planner's criterion looks at the path of this training; give the folder to record it in")

    def _refuse_sharded(self, model: nn.Module) -> None:
        if (self.plan is not None or self._gradual is not None or self._online is not None) and any(
            map(is_spread, model.parameters())
        ):
            raise UsageError(
                "the model's parameters are sharded over processes (fully_shard): its path can be recorded, masks are not held "
                "there and scores not added up; leave out plan and online, or train with DistributedDataParallel"
            )

    def _made(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], taken: int, processes: int) -> Recorder:
        assert self.folder is not None
        if taken and (self.folder / "trajectory.json").exists():
            made = Recorder.resume(self.folder, model, optimizers, taken=taken)
        else:  # the loop's own checkpoints are what it goes on from, so no snapshots are needed
            made = Recorder(self.folder, model, optimizers, self._facts, snapshot_every=0, **self._options)
        if made.processes != processes:
            raise UsageError(
                f"{processes} processes train, and torch.distributed knows of {made.processes}; recording takes what "
                "torch.distributed's default group trains (DDP, fully_shard)"
            )
        return made

    def _listen(self, loader: Any, stack: ExitStack) -> None:
        if self._recorder is None or loader is None:
            return
        try:
            self._order = Order(loader)
        except ValueError as why:
            if self._recorder.first:
                warnings.warn(
                    f"Recording: which samples a step sees is not noted ({why}); explanations by training samples and replaying "
                    "will not work, everything else will",
                    Note,
                    stacklevel=3,
                )
            self._recorder.without_samples()
        else:
            stack.callback(self._order.release)

    def _look_at_clipping(
        self,
        recorder: Recorder,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        processes: int,
        scale: Callable[[], float],
        stack: ExitStack,
    ) -> None:
        if processes > 1:
            self.clipping_unknown("several processes average their gradients before it")
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        stack.enter_context(Clipping(trained, optimizers, recorder.gradient_scale, scale))

    def _pruning(self, gradual: Gradual, held: Held, steps: int) -> Callable[..., None]:
        planner, done = gradual.planner, 0
        dense = model_digest(held.model)

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal done
            if skipped(optimizer):
                return
            done += 1
            sparsity = gradual.schedule.due(done, steps, gradual.sparsity)
            if sparsity is None:
                return
            plan = planner.plan(held.model, sparsity, self.plan, held.so_far() if planner.of_path else None)
            held.shrink(plan.masks())
            facts = {"model": dense, "trajectory": planner.evidence.trajectory.hash, "sparsity": gradual.sparsity}
            self.plan = plan.saying(**facts)

        return after_step
