"""Which number of some samples is explained: answered minus right, a class, a difference of two, a loss against its mean."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import torch

from prunekit.errors import UsageError, nearest
from prunekit.explain.tokens import has_places, place_of
from prunekit.explain.view import QUANTITIES, Asked, View
from prunekit.task import Places

ERROR, ANSWER, RIGHT, LOSS = "error", "answer", "right", "loss"
LOG_PROB, MARGIN = "log_prob", "margin"
OF_CLASSES = (ERROR, ANSWER, RIGHT, LOSS)
"""Names of targets of classifiers, beside a class (``7``) and a difference of classes (``7-3``)."""


def ask(view: View, target: str | None = None, chosen: int | None = None, position: int | None = None) -> View:
    """The same model looked at for one number: the sum over the chosen samples of each one's target.

    Args:
        target: with one class a sample ``error`` (the answered class's output less the right one's), ``answer``, ``right``, a
            class (``7``), a difference of classes (``7-3``), or one of the task's own targets; else one of those. By default the
            error where all chosen samples are misclassified, else the answer of a single one, and the right class's output of
            several; without classes the loss where the view has others to compare it with, else the task's target.
        chosen: the first samples of the view are those that are explained; all by default. The others only give the mean that a
            loss is compared with.
        position: of one token (``prunekit.explain.tokens``), whose log-probability, or margin, is explained alone.

    Raises:
        UsageError: there is no such target; or an error is asked for of a sample that is answered right.
    """
    count = view.count if chosen is None else chosen
    if position is not None:
        return _of_token(view, target, count, position)
    if target is None and not view.classifies:
        target = LOSS if count < view.count and LOSS in view.task.targets() else view.task.target
    if view.classifies and (target == "outputs" or target not in view.task.targets()):
        return _of_classes(view, target, count)
    return _of_task(view, str(target), count)


def needs_others(view: View, target: str | None, position: int | None = None) -> bool:
    """Whether ``ask`` compares with the mean over other samples."""
    if position is not None:
        return False
    return LOSS in view.task.targets() and (target == LOSS or (target is None and not view.classifies))


def _of_classes(view: View, target: str | None, count: int) -> View:
    end = view.values(view.trajectory.state(-1))[:count]
    answers, labels = end.argmax(1), view.labels[:count].to(end.device)
    wrong, classes = answers != labels, end.shape[1]
    if target is None:
        target = ERROR if bool(wrong.all()) else ANSWER if count == 1 else RIGHT
    weights = torch.zeros(view.count, classes, dtype=end.dtype, device=end.device)
    rows = torch.arange(count, device=end.device)
    one = count == 1
    if target == ERROR:
        if not bool(wrong.all()):
            place = int((~wrong).nonzero()[0])
            raise UsageError(
                f"--target error: the sample of class {int(labels[place])} at place {place} is answered right, so there is no "
                f"error to explain; leave it out, or ask for --target answer, right, or a difference of classes such as "
                f"{int(labels[place])}-{int(end[place].topk(2).indices[1])}"
            )
        weights[rows, answers] += 1
        weights[rows, labels] -= 1
        said = (
            f"answered minus right: the output of class {int(answers[0])} (answered) less that of class {int(labels[0])} (right)"
            if one
            else "answered minus right: each sample's output of the class that it was answered with, less that of its right class"
        )
    elif target in (ANSWER, RIGHT):
        where = answers if target == ANSWER else labels
        weights[rows, where] = 1
        which = f"class {int(where[0])}" if one else "the class"
        named = "answered" if target == ANSWER else "right"
        said = f"the output of {which} ({named}) less the mean of all outputs"
    else:
        plus, minus = _classes_named(target, classes)
        weights[rows, plus] += 1
        if minus is not None:
            weights[rows, minus] -= 1
        said = f"the output of class {plus} less {'the mean of all outputs' if minus is None else f'that of class {minus}'}"
    return replace(view, asked=Asked(weights, target, said + ("" if one else f", summed over {count} samples"), count))


def _classes_named(target: str, classes: int) -> tuple[int, int | None]:
    """The class, or both, of ``7`` and ``7-3``."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", target, re.ASCII)
    if not found:
        raise UsageError(
            f"--target {target!r} does not exist; {nearest(target, list(OF_CLASSES))} "
            "(or a class such as 7, or a difference such as 7-3)"
        )
    named = [int(number) for number in found.groups() if number is not None]
    if any(c >= classes for c in named) or len(set(named)) < len(named):
        raise UsageError(f"--target {target}: name one class of 0 to {classes - 1}, or two different ones")
    return named[0], named[1] if len(named) == 2 else None


def _of_task(view: View, target: str, count: int) -> View:
    function = copy.copy(view.function)
    try:
        function.target = view.task.get_target(target)
    except UsageError as error:
        raise UsageError(f"--target: {error}") from None
    valued = replace(view, function=function, classifies=False)
    by_place = ""
    task = view.task
    if isinstance(task, Places) and has_places(task, view.y) and (values := task.at_places(target)):
        function.target, by_place = values, MARGIN if target == MARGIN else LOG_PROB
        ones = task.place_shares(target, view.y).to(valued.values(view.trajectory.state(-1)))
    else:
        ones = torch.ones_like(valued.values(view.trajectory.state(-1)))
    said = QUANTITIES.get(target, f"the target {target}")
    if target == LOSS and count < view.count:
        others = view.count - count
        ones[count:] *= -count / others
        said = f"{'the' if count == 1 else 'each'} sample's loss less the mean loss of the first {others} samples of the split"
    else:
        ones[count:] = 0
    if count > 1:
        said += f", summed over {count} samples"
    return replace(valued, asked=Asked(ones, target, said, count, by_place))


def _of_token(view: View, target: str | None, count: int, position: int) -> View:
    target = target or LOG_PROB
    if target not in (LOG_PROB, MARGIN):
        raise UsageError(f"--target is {target}; of one token (--position) {LOG_PROB} or {MARGIN} is explained")
    places = [place_of(view, position, k) for k in range(count)]
    function = copy.copy(view.function)
    values = view.task.at_places(target) if isinstance(view.task, Places) else None
    assert values is not None  # a place has both
    function.target = values
    valued = replace(view, function=function, classifies=False)
    weights = torch.zeros_like(valued.values(view.trajectory.state(-1)))
    weights[torch.arange(count), places] = 1
    which = "log-probability" if target == LOG_PROB else "margin (its output less the largest other one)"
    said = f"the {which} of the token at position {position}" + ("" if count == 1 else f", summed over {count} samples")
    return replace(valued, asked=Asked(weights, target, said, count, target))
