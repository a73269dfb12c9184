"""How a run's pruned model is trained on: for how long, at which rate, what is recorded of it, and whether all that can be."""

from __future__ import annotations

from typing import Any, Literal

from prunekit import ranks
from prunekit.errors import ArtifactError, UsageError
from prunekit.recipe import Prune, Steps, optimizer_of, scheduler_of
from prunekit.recipe.training import Optimizer
from prunekit.repair.stream import Stream
from prunekit.steps import ByDivergence, ByLoss, Finetuning
from prunekit.steps.low_rank import Adapted
from prunekit.training import Distillation, batches_per_epoch
from prunekit.trajectory import disk_needed, room_for
from prunekit.trajectory.copies import copied
from prunekit.verbs.run_folder import RECORDED, Run

By = Literal["divergence", "loss"]
"""What a rate is searched for by."""


def finetuning_of(run: Run, steps: Steps) -> Finetuning:
    """What ``steps`` ask for, on the run's data, with its recipe's optimizer and schedule where they say nothing."""
    recipe, asked, train = run.recipe, steps.of_training(), run.splits["train"]
    options = asked.optimizer or recipe.train.optimizer
    if asked.lr is not None:
        options = options.model_copy(update={"lr": asked.lr})
    epochs, most = _length(run, steps)
    teacher = _teacher(run, asked.distill.model_dump()) if asked.distill else None
    return Finetuning(
        batch=train.batch,
        samples=len(train),
        optimizer=lambda model: optimizer_of(model, options),
        scheduler=lambda optimizer, total: scheduler_of(optimizer, total, asked.schedule or recipe.train.schedule),
        task=run.task,
        epochs=epochs,
        batch_size=recipe.train.batch_size,
        seed=recipe.seed if asked.seed is None else asked.seed,
        drop_last=recipe.train.drop_last,
        augment=recipe.load_augment(),
        distill=teacher,
        rate=_judge(run, steps, teacher),
        record=_record(run, steps),
        lora=asked.lora,
        device=run.device,
        most=most,
    )


def _length(run: Run, steps: Steps) -> tuple[int, int | None]:
    """Epochs of a round, and the steps after which it ends within them."""
    train, asked = run.recipe.train, steps.of_training()
    if steps.rewind is not None:
        return train.epochs, None
    if asked.tokens is None:
        return epochs_of(run, asked.epochs), None
    most = Stream(run.batches("train"), train.batch_size).steps(asked.tokens, "finetune")
    return -(-most // _batches(run)), most


def _batches(run: Run) -> int:
    """Steps of an epoch."""
    train = run.recipe.train
    return batches_per_epoch(len(run.splits["train"]), train.batch_size, train.drop_last)


def _record(run: Run, steps: Steps) -> dict[str, Any]:
    """Options of the recorder."""
    asked, record = steps.of_training(), run.recipe.train.record
    name = (asked.optimizer or run.recipe.train.optimizer).name
    return {
        "every": asked.record_every or record.every,
        # data-wise scores end where masks are held; there Adam's coupled decay alone needs the moments
        "second_moments": record.second_moments and name == "adam" and asked.lora is None,
    }


def rate_by(run: Run, steps: Steps) -> By | None:
    """What the rate is searched for by, where nobody says it; None where somebody does, or the dense training's is taken.

    By the divergence from the dense model where that is what tokens are tuned by; and of a model whose training nobody knows,
    since it was imported, by what it is trained by.
    """
    asked, optimizer = steps.finetune, run.recipe.train.optimizer
    if by_tokens(steps):
        return None  # what they are divided into is asked for by itself
    if asked is None or asked.lr is not None or asked.optimizer is not None or optimizer.name not in ("adam", "adamw"):
        return None
    if steps.rewind is not None or steps.schedule.name == "gradual":  # begins with nothing removed
        return None
    unknown = _optimizer_of(run) not in ("adamw", "adam", "sgd") and optimizer == Optimizer()
    soft = asked.distill is not None and ByDivergence.fits(run.task)
    if soft and asked.distill is not None and (asked.tokens is not None or (unknown and asked.distill.weight == 1)):
        return "divergence"
    return "loss" if unknown else None


def _judge(run: Run, steps: Steps, teacher: Distillation | None) -> ByDivergence | ByLoss | None:
    """By what the rate is searched for, on the scoring samples."""
    by = rate_by(run, steps)
    if by is None:
        return None
    judges = run.batches("scoring", run.recipe.score.samples)
    return ByLoss(judges, run.task) if by == "loss" or teacher is None else ByDivergence(teacher.teacher, judges, run.task)


def _optimizer_of(run: Run) -> str | None:
    """Name of what the dense model was trained by; None where nothing is known of that."""
    described = run.trajectory.header["optimizer"]
    return None if described is None else str(described.get("name", "")).removeprefix("torch.").lower()


def by_tokens(steps: Steps) -> bool:
    """Whether a budget of tokens for mask and weights says how long is trained."""
    return isinstance(steps, Prune) and steps.tokens is not None


def check_training(run: Run, steps: Steps | None) -> None:
    """Refuses training that cannot be, before anything long begins.

    Raises:
        UsageError: a rank that does not fit the model, or what only a model whose training is known has.
    """
    if steps is None or not steps.trains:
        return
    if steps.rewind is not None and (_optimizer_of(run) is None or RECORDED in run.trajectory.provenance):
        raise UsageError(
            "--rewind needs a training of prunekit's own, to train on as it did; this run was imported, and how its loop "
            "went on is not known; leave it out and give --finetune EPOCHS"
        )
    if _optimizer_of(run) is None:
        check_epochs(steps)
    if (rank := steps.of_training().lora) is not None:
        Adapted.of(run.model, rank, run.evidence.prunable)


def check_room(run: Run, steps: Steps) -> None:
    """Raises ArtifactError where the disk has no room for the states that training would record."""
    if not steps.trains or by_tokens(steps):
        return
    record, count = _record(run, steps), _steps_recorded(run, steps)

    def needed(every: int) -> int:
        seen = count * run.recipe.train.batch_size
        return disk_needed(run.model, count, seen, **{**record, "every": every}, snapshot=False)

    free = ranks.from_first(lambda: room_for(run.path))
    if needed(record["every"]) <= free:
        return
    fits = next((2**k for k in range(1, 20) if record["every"] < 2**k <= count and 2 * needed(2**k) < free), None)
    raise ArtifactError(
        f"{run.path}: recording {count:,} steps of training takes {needed(record['every']) / 1e6:,.1f} MB, and "
        f"{free / 1e6:,.1f} MB are free; "
        + (f"give --record-every {fits}, which keeps a state every so many" if fits else "make room, or train less")
    )


def _steps_recorded(run: Run, steps: Steps) -> int:
    """Of all rounds; of rewound ones the last alone, which those before make room for."""
    epochs, most = _length(run, steps)
    whole = epochs * _batches(run) if most is None else most
    if steps.rewind is not None:
        end = end_of(run, steps)
        return max(0, min(whole, whole if end is None else end) - steps.rewind)
    repair = steps.repair if isinstance(steps, Prune) else None
    rounds = steps.schedule.rounds if steps.schedule.name == "iterative" else 1
    return (rounds + (repair.again if repair is not None else 0)) * whole


def end_of(run: Run, steps: Steps) -> int | None:
    """The step at which training from a rewound state stops, short of the dense training's end; None for that."""
    asked = steps.of_training().epochs
    if steps.rewind is None:
        return None
    if asked is None:
        return len(run.trajectory)  # which may have ended before its last epoch
    return steps.rewind + epochs_of(run, asked) * _batches(run)


def _teacher(run: Run, options: dict[str, Any]) -> Distillation:
    return Distillation(copied(run.model).to(run.device), **options, task=run.task)


def check_epochs(steps: Steps) -> None:
    """Raises UsageError where training takes a share of the dense training's epochs, and of that one nothing is known."""
    asked = steps.finetune
    if asked is not None and not by_tokens(steps) and asked.tokens is None and (asked.epochs is None or asked.epochs < 1):
        said = "finetune without epochs" if asked.epochs is None else f"--finetune {asked.epochs:g}"
        raise UsageError(
            f"{said} is measured by the epochs of the dense training, which of an imported model nobody knows; give a whole "
            "number of epochs, or tokens (--tune-tokens)"
        )


def epochs_of(run: Run, asked: float | None) -> int:
    train = run.recipe.train
    dense = train.epochs
    if train.watch is not None and train.watch.until is not None and run.trajectory.header["optimizer"] is not None:
        dense = len(run.trajectory) // _batches(run)
    if asked is None:
        return dense
    return int(asked) if asked >= 1 else max(1, round(asked * dense))
