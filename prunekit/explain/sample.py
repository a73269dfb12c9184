"""Why a sample has its answer, and what a training sample gave to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunekit.batch import to
from prunekit.errors import PrunekitError
from prunekit.explain.asked import ask
from prunekit.explain.path import JUMP_NODES, SCHEMA, PrunedPath, half_by, phases, summed, trace
from prunekit.explain.ranking import RANKED, Units, coordinate_scores, every_unit, layers_ranked
from prunekit.explain.tokens import token_account
from prunekit.explain.training import Training, training_samples
from prunekit.explain.view import View, quantity
from prunekit.kernel import data_scores, shares_by_layer
from prunekit.kernel.datawise import check_data_scores
from prunekit.progress import Bar

TRACED = 10  # classes for which training samples are traced apart


def explain_sample(
    view: View,
    number: int,
    split: str,
    training: Training | None = None,
    pruned: Sequence[PrunedPath] = (),
    units: Units | None = None,
    limit: int = RANKED,
) -> dict[str, Any]:
    """Why the model gives one sample (the view's first) its answer: by step, part and training sample, and pruned.

    What is summed up is what the view was asked for, else what ``prunekit.explain.asked.ask`` takes by itself: of a wrong answer
    the answered class's output less the right one's.

    Args:
        units: the model's channels and heads, ranked beside its layers.
        limit: of each kind of part, how many are named.
    """
    asked = view if view.asked is not None else ask(view)
    assert asked.asked is not None
    last = view.trajectory.state(-1)
    values, weights = asked.values(last).double(), asked.own
    end = values[0]
    traced = trace(asked, None)
    scores = coordinate_scores(asked)
    account = token_account(asked, traced.kernel + traced.regularisation, pruned)
    told = range(len(end)) if asked.classifies else [c for c, _, _ in asked.classes(end[None])]
    return {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "sample",
        "name": str(number),
        "index": split,
        "title": f"{split} sample {number}",
        "quantity": quantity(asked),
        **asked.about,
        "samples": 1,
        "label": view.label(),
        "answer": view.answers(last)[0],
        "contribution": {
            "kernel": summed(weights, traced.kernel), "regularisation": summed(weights, traced.regularisation),
            "both": summed(weights, traced.kernel + traced.regularisation),
            "model_at_start": summed(weights, traced.start), "model": summed(weights, values),
        },
        "classes": [
            {"class": c, "start": float(traced.start[0, c]), "kernel": float(traced.kernel[0, c]),
             "regularisation": float(traced.regularisation[0, c]), "model": float(end[c])}
            for c in told
        ],
        **({} if account is None else {"tokens": account}),
        "steps": traced.steps,
        "layers": scores.layers,
        "ranked": {"layer": layers_ranked(scores, limit), **every_unit(scores, units or {}, limit)},
        "completeness": scores.completeness,
        "training": training_samples(asked, weights[None], None, training, summed(weights, traced.kernel)),
        "pruning": [_pruned_sample(asked, path, weights) for path in pruned],
        "certificate": traced.certificate,
    }  # fmt: skip


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
            "classes": chosen, "by_class": by_step.tolist(), "half_by": half_by(list(range(len(series))), series),
            "phases": phases(list(range(len(series))), len(series), {"kernel": series}),
        },
        "pruning": [_pruned_sample(mine, path, mine.own) for path in pruned],
        "certificate": {
            "mean_error": float((rebuilt - last).abs().mean()), "max_error": float((rebuilt - last).abs().max()),
            "mean_output": float(last.abs().mean()), "nodes": view.nodes, "rule": view.rule,
        },
    }  # fmt: skip


def _pruned_sample(view: View, path: PrunedPath, weights: Tensor) -> dict[str, Any]:
    after = view.values(path.end).double()
    shares: dict[str, float] = {}
    for jump in path.jumps:
        for layer, share in shares_by_layer(view.function, jump, view.x, view.y, JUMP_NODES).items():
            shares[layer] = shares.get(layer, 0.0) + summed(weights, share.double())
    change = sum(summed(weights, (view.values(j.end) - view.values(j.start)).double()) for j in path.jumps)
    return {
        "name": path.name,
        "answer": view.answers(path.end)[0],
        "model": summed(weights, after),
        "change": change,
        "by_layer": shares,
        "residual": sum(shares.values()) - change,
    }
