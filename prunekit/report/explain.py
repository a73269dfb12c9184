"""Why a part, a sample's answer or a changed answer is what it is: the kernel's sums, as JSON values.

Everything here is one quantity summed in different ways: how far coordinates moved an output along the path,
``∫ ∇f · (mask ⊙ dθ)`` (ExPLAIND, arXiv 2505.20076; docs/kernel.md). A mask gives a part, a piece of the path gives the time,
the data-wise recursion gives training samples, and the pruning is a piece of the path as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import Batch, to
from prunekit.errors import PrunekitError, UsageError
from prunekit.kernel import data_scores, layer_step_scores, layers_of, shares_by_layer
from prunekit.kernel.datawise import check_data_scores
from prunekit.progress import Bar
from prunekit.report.answers import label_of
from prunekit.report.parts import STRUCTURES, Part
from prunekit.report.view import View, quantity
from prunekit.trajectory import Segment

SCHEMA = 1
STRONGEST = 12  # training samples named on either side
PHASES = 12
JUMP_NODES = 32  # a pruning is one long piece with kinks in it
DOUBLED = 8  # pieces on which the nodes are doubled, to know the error of a part's own sums
TRACED = 10  # classes for which training samples are traced apart


@dataclass(frozen=True)
class Training:
    """What the data-wise scores need of the training data: ``batch(indices)`` or ``batch(indices, seed)``, the mean loss.

    ``loss`` is a function ``(outputs, labels) -> scalar``, a ``prunekit.task.Loss``, or None for the task's own.
    """

    batch: Callable[..., Batch]
    loss: Any = None


@dataclass(frozen=True)
class PrunedPath:
    """How a pruned model came from the dense one.

    Attributes:
        name: of the pruned model.
        keep: flat ``(P,)`` of bool, False where the plan removes.
        units: group -> ``(units,)`` of bool, False where one goes; empty for plans of single weights.
        jumps: the pieces in which weights were set: the pruning, in steps where a schedule made it so.
        end: its weights in dense coordinates, ``(P,)``, fine-tuned or not.
    """

    name: str
    keep: Tensor
    units: Mapping[str, Tensor]
    jumps: tuple[Segment, ...]
    end: Tensor


def explain_part(view: View, part: Part, training: Training | None = None, pruned: Sequence[PrunedPath] = ()) -> dict[str, Any]:
    """What a part contributed: to which classes, when, from which training samples, and what pruning did through it."""
    mask, weights = part.mask.to(view.function.device), view.own
    traced = trace(view, mask)
    kernel, regularisation = traced.kernel, traced.regularisation
    both = kernel + regularisation
    end = view.values(view.trajectory.state(-1)).double()
    by_kernel, by_decay = {c: own for c, own, _ in view.classes(kernel)}, {c: own for c, own, _ in view.classes(regularisation)}
    strength = {c: float(both[view.labels == c].abs().mean() if view.classifies else both[:, c].abs().mean()) for c in by_kernel}
    model = {c: own for c, own, _ in view.classes(end)}
    rows = [
        {
            "class": c, "samples": int((view.labels == c).sum()) if view.classifies else view.count,
            "own": own, "others": others, "tells_apart": own - others if view.classifies else own,
            "kernel": by_kernel[c], "regularisation": by_decay[c], "mean_size": strength[c], "model": model[c],
        }
        for c, own, others in view.classes(both)
    ]  # fmt: skip
    start, last = view.trajectory.state(0).cpu()[part.mask], view.trajectory.state(-1).cpu()[part.mask]
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": part.kind,
        "name": part.name,
        "index": part.index,
        "title": part.title,
        "quantity": quantity(view),
        **view.about,
        "samples": view.count,
        "weights": {
            "total": int(part.mask.sum()), "by_tensor": part.counts(view.trajectory.layout),
            "norm_at_start": float(start.norm()), "norm_at_end": float(last.norm()),
            **({"value_at_start": float(start), "value_at_end": float(last)} if len(last) == 1 else {}),
        },
        "contribution": {
            "kernel": _sum(weights, kernel), "regularisation": _sum(weights, regularisation), "both": _sum(weights, both),
            "mean_size": float(both.abs().mean()),
            "model_at_start": _sum(weights, traced.start), "model": _sum(weights, end),
        },
        "classes": sorted(rows, key=lambda row: -abs(float(row["tells_apart"]))),
        "steps": traced.steps,
        "training": training_samples(view, weights[None], mask, training, _sum(weights, kernel)),
        "pruning": [_pruned_part(view, path, part) for path in pruned],
        "certificate": traced.certificate,
    }  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """A mask followed along the path: sums over it ``(samples, targets)``, by step, and how far to trust them."""

    kernel: Tensor
    regularisation: Tensor
    start: Tensor
    steps: dict[str, Any]
    certificate: dict[str, Any]


def trace(view: View, mask: Tensor | None) -> Trace:
    """Follows the coordinates of ``mask`` (None: all) along the path: one directional derivative a step and share."""
    weights = view.own
    value = start = view.values(view.trajectory.state(0)).double()
    rebuilt = start.clone()
    sums = {"kernel": torch.zeros_like(start), "regularisation": torch.zeros_like(start)}
    series: dict[str, list[float]] = {"kernel": [], "regularisation": []}
    firsts, by_class, residuals, off = [], [], [], [0.0, 0.0]
    doubled = set(range(0, view.pieces, max(1, view.pieces // DOUBLED)))
    with Bar("along the path (steps)", view.pieces) as bar:
        for number, segment in enumerate(view.segments()):
            both = torch.zeros_like(start)
            for share, moved in (("kernel", segment.data_update), ("regularisation", segment.regularisation)):
                one = torch.zeros_like(start)
                if bool((moved if mask is None else moved[mask.cpu()]).any()):
                    one = view.moved(segment, share, mask)
                    if share == "kernel" and number in doubled:
                        fine = view.moved(segment, share, mask, 2 * view.nodes)
                        off = [off[0] + float((fine - one).abs().sum()), off[1] + float(fine.abs().sum())]
                sums[share] += one
                series[share].append(_sum(weights, one))
                both += one
            after = view.values(segment.end).double()
            change = both if mask is None else view.moved(segment, "whole", None)
            residuals.append(float((change - (after - value)).abs().mean()))
            rebuilt, value = rebuilt + change, after
            firsts.append(segment.index)
            by_class.append([own for _, own, _ in view.classes(both)])
            bar.advance()
    steps = {
        "first": firsts, **series, "classes": [c for c, _, _ in view.classes(start)], "by_class": by_class,
        "half_by": _half(firsts, [a + b for a, b in zip(series["kernel"], series["regularisation"], strict=True)]),
        "phases": phases(firsts, len(view.trajectory), series),
    }  # fmt: skip
    certificate = {
        "mean_error": float((rebuilt - value).abs().mean()), "max_error": float((rebuilt - value).abs().max()),
        "mean_output": float(value.abs().mean()), "total": sum(residuals),
        "worst_step": firsts[max(range(len(residuals)), key=residuals.__getitem__)], "worst": max(residuals),
        "part_error": off[0] / off[1] if off[1] else 0.0, "nodes": view.nodes, "rule": view.rule,
    }  # fmt: skip
    return Trace(sums["kernel"], sums["regularisation"], start, steps, certificate)


def phases(firsts: Sequence[int], steps: int, series: Mapping[str, Sequence[float]], count: int = PHASES) -> list[dict[str, Any]]:
    """Stretches of training of the same length, each with the sums of ``series`` inside."""
    count = min(count, len(firsts))
    edges = [round(k * len(firsts) / count) for k in range(count + 1)]
    return [
        {
            "begin": firsts[a], "end": firsts[b] if b < len(firsts) else steps,
            **{name: float(sum(values[a:b])) for name, values in series.items()},
        }
        for a, b in pairwise(edges)
    ]  # fmt: skip


def training_samples(
    view: View, weights: Tensor, mask: Tensor | None, training: Training | None, kernel: float
) -> dict[str, Any]:
    """The training samples that a number comes from, strongest first; ``note`` alone where they cannot be told.

    Args:
        weights: ``(1, samples, targets)``: the number is the weighted sum of the view's values.
        kernel: what the steps say that the gradients did to it; the samples' scores sum to the same.
    """
    if training is None:
        return {"note": "this run has no training data, so training samples cannot be told"}
    try:
        check_data_scores(view.trajectory)
    except PrunekitError as error:
        return {"note": str(error)}
    with Bar("training samples (steps)", len(view.trajectory)) as bar:
        try:
            found = data_scores(
                view.function, view.trajectory, view.x, view.y, training.batch, training.loss, aggregate=weights, only=mask,
                nodes=view.nodes, rule=view.rule, tick=bar.advance,
            )  # fmt: skip
        except UsageError as error:  # a loss that mixes its batch
            return {"note": str(error)}
    scores = found.scores[:, 0, 0].double().cpu()
    order = scores.argsort(descending=True).tolist()
    raised = [k for k in order[:STRONGEST] if scores[k] > 0]
    lowered = [k for k in order[::-1][:STRONGEST] if scores[k] < 0]
    return {
        "seen": int((scores != 0).sum()),
        "sum": float(scores.sum()),
        "momentum": float(found.momentum.sum()),
        "difference_to_steps": float(scores.sum()) + float(found.momentum.sum()) - kernel,
        "raised": _named(raised, scores, training),
        "lowered": _named(lowered, scores, training),
    }


def _named(indices: list[int], scores: Tensor, training: Training) -> list[dict[str, Any]]:
    labels = training.batch(torch.tensor(indices))[1] if indices else None
    return [
        {"index": k, "label": label_of(labels, place, len(indices)), "score": float(scores[k])} for place, k in enumerate(indices)
    ]


def _pruned_part(view: View, path: PrunedPath, part: Part) -> dict[str, Any]:
    """What the pruning did to the outputs through a part."""
    weights, mask = view.own, part.mask.to(view.function.device)
    through, change, whole = (torch.zeros_like(weights, dtype=torch.float64) for _ in range(3))
    for jump in path.jumps:
        through += view.moved(jump, "whole", mask, JUMP_NODES)
        whole += view.moved(jump, "whole", None, JUMP_NODES)
        change += view.values(jump.end).double() - view.values(jump.start).double()
    inside = path.keep[part.mask]
    unit = part.kind in STRUCTURES and part.name in path.units
    return {
        "name": path.name,
        "stays": bool(path.units[part.name][int(part.index)]) if unit else bool(inside.any()),
        "removed": int((~inside).sum()),
        "of": len(inside),
        "change": _sum(weights, through),
        "whole_change": _sum(weights, change),
        "mean_size": float(through.abs().mean()),
        "whole_mean_size": float(change.abs().mean()),
        "residual": float((whole - change).abs().mean()),
        "classes": [{"class": c, "own": own, "others": others} for c, own, others in view.classes(through)],
    }


def explain_sample(
    view: View, number: int, split: str, training: Training | None = None, pruned: Sequence[PrunedPath] = ()
) -> dict[str, Any]:
    """Why the model gives one sample (the view's only one) its answer: by step, layer and training sample, and pruned.

    What is summed up is the output that the model answers with (centred); without classes, the sum of the task's target.
    """
    end = view.values(view.trajectory.state(-1)).double()[0]
    answer = int(end.argmax()) if view.classifies else None
    weights = torch.ones_like(view.own) if answer is None else torch.zeros_like(view.own)
    if answer is not None:
        weights[0, answer] = 1
    asked = view if answer is None else replace(view, y=torch.full_like(view.y, answer))
    traced = trace(asked, None)
    layers = by_layer(asked, weights)
    told = range(len(end)) if view.classifies else [c for c, _, _ in view.classes(end[None])]
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "sample",
        "name": str(number),
        "index": split,
        "title": f"{split} sample {number}",
        "quantity": quantity(view),
        **view.about,
        "samples": 1,
        "label": view.label(),
        "answer": view.answers(view.trajectory.state(-1))[0] if answer is None else answer,
        "contribution": {
            "kernel": _sum(weights, traced.kernel), "regularisation": _sum(weights, traced.regularisation),
            "both": _sum(weights, traced.kernel + traced.regularisation),
            "model_at_start": _sum(weights, traced.start), "model": _sum(weights, end[None]),
        },
        "classes": [
            {"class": c, "start": float(traced.start[0, c]), "kernel": float(traced.kernel[0, c]),
             "regularisation": float(traced.regularisation[0, c]), "model": float(end[c])}
            for c in told
        ],
        "steps": traced.steps,
        "layers": layers,
        "training": training_samples(asked, weights[None], None, training, _sum(weights, traced.kernel)),
        "pruning": [_pruned_sample(asked, path, weights) for path in pruned],
        "certificate": traced.certificate,
    }  # fmt: skip


def _pruned_sample(view: View, path: PrunedPath, weights: Tensor) -> dict[str, Any]:
    after = view.values(path.end).double()
    shares: dict[str, float] = {}
    for jump in path.jumps:
        for layer, share in shares_by_layer(view.function, jump, view.x, view.y, JUMP_NODES).items():
            shares[layer] = shares.get(layer, 0.0) + _sum(weights, share.double())
    change = sum(_sum(weights, (view.values(j.end) - view.values(j.start)).double()) for j in path.jumps)
    return {
        "name": path.name,
        "answer": int(after.argmax()) if view.classifies else view.answers(path.end)[0],
        "model": _sum(weights, after),
        "change": change,
        "by_layer": shares,
        "residual": sum(shares.values()) - change,
    }


def explain_training_sample(view: View, number: int, training: Training, pruned: Sequence[PrunedPath] = ()) -> dict[str, Any]:
    """What one training sample gave: to which classes of the view's samples, and in which steps.

    Raises:
        PrunekitError: the trajectory does not hold what data-wise scores need, or training never saw the sample.
    """
    check_data_scores(view.trajectory)
    start, end = (view.values(view.trajectory.state(i)).double() for i in (0, -1))
    strength = {c: abs(own - before) for (c, own, _), (_, before, _) in zip(view.classes(end), view.classes(start), strict=True)}
    chosen = sorted(sorted(strength, key=lambda c: -strength[c])[:TRACED])
    seen = [s for s in range(len(view.trajectory)) if any(number in b for b in view.trajectory.step(s).batches or ())]
    if not seen:
        raise PrunekitError(f"training sample {number} is in no batch of {view.trajectory.folder}")
    with Bar("training samples (steps)", len(view.trajectory)) as bar:
        found = data_scores(
            view.function, view.trajectory, view.x, view.y, training.batch, training.loss, aggregate=view.queries(chosen),
            watch=[number], nodes=view.nodes, rule=view.rule, tick=bar.advance,
        )  # fmt: skip
    scores = found.scores[:, 0].double()
    sizes = scores.abs().sum(1)
    x, y = training.batch(torch.tensor([number]))
    by_step = found.by_step[:, 0, 0].double()
    series = by_step.mean(1).tolist()
    mine = replace(view, x=to(x, view.function.device), y=to(y, view.function.device))
    rebuilt, last = found.rebuilt[0], (end * view.queries(chosen)).sum((1, 2))
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "sample",
        "name": str(number),
        "index": "train",
        "title": f"train sample {number}",
        "quantity": quantity(view),
        **view.about,
        "samples": view.count,
        "label": mine.label(),
        "answer": mine.answers(view.trajectory.state(-1))[0],
        "contribution": {"both": float(scores[number].mean()), "rank": int((sizes > sizes[number]).sum()) + 1, "of": len(sizes)},
        "classes": sorted(
            (
                {"class": c, "own": float(scores[number, k]), "all_samples": float(scores[:, k].sum())}
                for k, c in enumerate(chosen)
            ),
            key=lambda row: -abs(float(row["own"])),
        ),
        "steps": {
            "first": list(range(len(series))), "kernel": series, "regularisation": [0.0] * len(series), "seen": seen,
            "classes": chosen, "by_class": by_step.tolist(), "half_by": _half(list(range(len(series))), series),
            "phases": phases(list(range(len(series))), len(series), {"kernel": series}),
        },
        "pruning": [_pruned_sample(mine, path, mine.own) for path in pruned],
        "certificate": {
            "mean_error": float((rebuilt - last).abs().mean()), "max_error": float((rebuilt - last).abs().max()),
            "mean_output": float(last.abs().mean()), "nodes": view.nodes, "rule": view.rule,
        },
    }  # fmt: skip


def by_layer(view: View, weights: Tensor) -> dict[str, Any]:
    """The weighted sum's step-wise scores by layer: ``layers``, ``first`` steps, and ``(layers, phases)`` sums of both shares."""
    firsts: list[int] = []

    def noted() -> Iterator[Segment]:
        for segment in view.segments():
            firsts.append(segment.index)
            yield segment

    with Bar("layers along the path (steps)", view.pieces) as bar:
        scores = layer_step_scores(
            view.function, noted(), view.x, view.y, weights, nodes=view.nodes, rule=view.rule, tick=bar.advance
        ).double()
    names = list(layers_of(view.trajectory.layout))
    rows = []
    for k, name in enumerate(names):
        series = {"kernel": scores[0, :, k].tolist(), "regularisation": scores[1, :, k].tolist()}
        rows.append({"layer": name, "phases": phases(firsts, len(view.trajectory), series)})
    return {"rows": rows, "kernel": float(scores[0].sum()), "regularisation": float(scores[1].sum())}


def _sum(weights: Tensor, values: Tensor) -> float:
    return float((weights.double() * values).sum())


def _half(firsts: Sequence[int], series: Sequence[float]) -> int:
    """The step by which half of the movement, up and down, was done."""
    total, so_far = sum(map(abs, series)), 0.0
    for first, value in zip(firsts, series, strict=True):
        so_far += abs(value)
        if so_far >= total / 2:
            return first
    return firsts[-1]
