"""Dense against pruned: which samples changed their answer, or moved furthest, and which removed groups did that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Inputs, Labels, size, take, to
from prunekit.explain.answers import answers_of, class_labels, class_outputs, divergence_name, label_of, outputs_at
from prunekit.explain.part import unit_mask
from prunekit.explain.path import JUMP_NODES, SCHEMA, PrunedPath
from prunekit.kernel import ModelFunction, get_rule, layers_of
from prunekit.kernel.attribution import MEMORY, chunks
from prunekit.kernel.gradients import GradientEngine, VmapGradients, choose_engine
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.task import Target, Task, get_task
from prunekit.task.evaluation import measures_told
from prunekit.trajectory import Layout, Segment, Trajectory

NAMED = 6  # groups named for each sample


def answer_margin(out: Tensor, pair: Tensor) -> Tensor:
    """The first answer's output less the second's, ``(samples, 1)``; ``pair`` ``(samples, 2)`` holds both classes."""
    return out.gather(1, pair[:, :1]) - out.gather(1, pair[:, 1:])


def explain_diff(
    model: nn.Module,
    trajectory: Trajectory,
    path: PrunedPath,
    plan: Plan,
    x: Inputs,
    y: Labels,
    *,
    limit: int,
    nodes: int = JUMP_NODES,
    memory: int = MEMORY,
    device: torch.device | str = "cpu",
    task: str | Task | None = None,
) -> dict[str, Any]:
    """Blames removed groups for changed answers, or, where there is not one class a sample, for the outputs' distance.

    With ``m(x)`` the dense answer's output less the pruned answer's, pruning lowers ``m`` from above 0 to below it. Along the
    pruning's straight pieces that is ``Σ_i blame_i = -Σ_i ∫ ∂_i m dθ_i``, exactly; a group's blame is the sum over what leaves
    with it. A coordinate that leaves with several groups counts for each in equal parts, so groups add up to the whole.
    Without classes ``-m(x)`` is the task's divergence of the sample's outputs from the dense model's, and no answer changes:
    the result names the samples that moved furthest.

    Args:
        x, y: samples and labels.
        limit: how many changed samples are blamed; the ones whose margin fell furthest.
        nodes: midpoints of every piece of the pruning.
        task: what the model is for; classification when None.

    Raises:
        UsageError: outputs and labels do not fit the task.
    """
    plan.only_zeros("explain --diff")
    kind = get_task(task)
    function = ModelFunction(model, trajectory.layout, trajectory.fixed, kind.target, device, task=kind)
    x, y = to(x, function.device), to(y, function.device)
    samples = size(x)
    dense, pruned = (outputs_at(function, state, x, y) for state in (trajectory.state(-1), path.end))
    kind.check(dense, y, "samples looked at")
    made = _classes(kind, dense, pruned, y) if class_labels(kind, dense, y) is not None else _values(kind, dense, pruned, y)
    shown = made.order[:limit]
    groups = _groups(plan, path, trajectory.layout)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "diff",
        "name": path.name,
        "index": "",
        "title": f"dense against {path.name}",
        "samples": samples,
        **made.facts,
    }
    result["changed"]["shown"] = len(shown)
    margins = function.narrowed(slice(None))
    margins.target = made.margin
    some, against = take(x, shown, samples), take(made.against, shown, samples)
    blame, layers = _blame(margins, path.jumps, some, against, len(shown), groups, nodes, memory)
    through = torch.zeros(len(shown), dtype=torch.float64)
    rewound = torch.zeros(len(shown), dtype=torch.float64)
    if len(shown):
        with torch.no_grad():
            for jump in path.jumps:
                ends = [margins(s.to(function.device), some, against)[:, 0].double().cpu() for s in (jump.start, jump.end)]
                through += ends[0] - ends[1]
            begins = margins(path.jumps[0].start.to(function.device), some, against)[:, 0].double().cpu()
        rewound = made.margins[0][shown].double().cpu() - begins
    fall = (made.margins[0] - made.margins[1]).double()
    residual = blame.sum(1) - through
    names = [name for name, _ in groups]
    top = blame.argsort(1, descending=True)[:, :NAMED].tolist()
    result["changes"] = [
        {
            "index": k, "label": made.labels[k], "dense": made.answers[0][k], "pruned": made.answers[1][k],
            "margin_dense": float(made.margins[0][k]), "margin_pruned": float(made.margins[1][k]),
            "rewinding": float(rewound[row]), "pruning": float(through[row]),
            "training_since": float(fall[k].cpu() - rewound[row] - through[row]), "residual": float(residual[row]),
            "groups": [{"name": names[g], "blame": float(blame[row, g])} for g in top[row] if blame[row, g] > 0],
        }
        for row, k in enumerate(shown.tolist())
    ]  # fmt: skip
    most = blame.argmax(1).tolist() if len(shown) and names else []
    mean = blame.mean(0) if len(shown) else blame.new_zeros(len(names))
    result["groups"] = sorted(
        ({"name": n, "blame": float(mean[g]), "first_for": most.count(g)} for g, n in enumerate(names)),
        key=lambda row: -abs(float(row["blame"])),
    )  # fmt: skip
    result["layers"] = [
        {"layer": name, "blame": float(layers[:, k].mean()) if len(shown) else 0.0}
        for k, name in enumerate(layers_of(trajectory.layout))
    ]
    result["certificate"] = {
        "mean_residual": float(residual.abs().mean()) if len(shown) else 0.0,
        "max_residual": float(residual.abs().max()) if len(shown) else 0.0,
        "mean_change": float(through.abs().mean()) if len(shown) else 0.0,
        "nodes": nodes,
    }
    return result


@dataclass(frozen=True)
class _Change:
    """How answers changed.

    Attributes:
        order: numbers of the samples that changed, most of all first.
        margin: the target that pruning lowers, ``(samples, 1)``; ``against``: what it takes as labels.
        margins: its values ``(samples,)``, dense and pruned.
        answers: dense and pruned, and ``labels``, one a sample as JSON values.
        facts: what the result says of all samples.
    """

    order: Tensor
    margin: Target
    against: Labels
    margins: tuple[Tensor, Tensor]
    answers: tuple[list[Any], list[Any]]
    labels: list[Any]
    facts: dict[str, Any]


def _classes(task: Task, dense: Tensor, pruned: Tensor, labels: Labels) -> _Change:
    y = class_labels(task, dense, labels)
    assert y is not None
    dense, pruned = class_outputs(task, dense), class_outputs(task, pruned)
    before, after = dense.argmax(1), pruned.argmax(1)
    changed = (before != after).nonzero()[:, 0]
    pair = torch.stack([before, after], 1)
    margins = answer_margin(dense, pair)[:, 0], answer_margin(pruned, pair)[:, 0]
    fall = (answer_margin(dense, pair) - answer_margin(pruned, pair))[:, 0].double()
    facts = {
        "accuracy": {"dense": float((before == y).float().mean()), "pruned": float((after == y).float().mean())},
        "changed": {
            "all": len(changed), "right_to_wrong": int(((before == y) & (after != y)).sum()),
            "wrong_to_right": int(((before != y) & (after == y)).sum()),
            "wrong_to_wrong": int(((before != y) & (after != y) & (before != after)).sum()),
        },
    }  # fmt: skip
    return _Change(
        changed[fall[changed].argsort(descending=True, stable=True)],
        lambda out, pair: answer_margin(class_outputs(task, out), pair),
        pair,
        margins,
        (before.tolist(), after.tolist()),
        y.tolist(),
        facts,
    )


def _values(task: Task, dense: Tensor, pruned: Tensor, labels: Labels) -> _Change:
    against = (task.reference(dense), labels)
    margins = -task.divergence(dense, against)[:, 0], -task.divergence(pruned, against)[:, 0]
    fall = margins[0] - margins[1]
    order = fall.argsort(descending=True, stable=True)
    figures = {
        measure.name: {name: measure.of(measure.each(out.cpu(), to(labels, "cpu")).double()) for name, out in
                       (("dense", dense), ("pruned", pruned))}
        for measure in task.measures
    }  # fmt: skip
    facts = {
        "task": task.name,
        "measures": measures_told(task),
        "figures": figures,
        "divergence_is": divergence_name(task) or "KL",
        "divergence": float(fall.double().mean()),
        "changed": {"all": int((fall > 0).sum())},
        "note": f"the task {task.name} has not one class a sample, so no answer changes from one class to another; told are the "
        "samples whose outputs moved furthest",
    }
    count = range(len(dense))
    return _Change(
        order[fall[order] > 0],
        lambda out, both: -task.divergence(out, both),
        against,
        margins,
        (answers_of(task, dense, labels), answers_of(task, pruned, labels)),
        [label_of(labels, k, len(dense)) for k in count],
        facts,
    )


def _groups(plan: Plan, path: PrunedPath, layout: Layout) -> list[tuple[str, Tensor]]:
    """``name -> coordinates`` of everything that a pruning removes or moves; a coordinate may be in several.

    Removed units by group and number; removed single weights by output row; what moved though it stays (compensation) by layer.
    """
    found: list[tuple[str, Tensor]] = []
    taken = torch.zeros(layout.total, dtype=torch.bool)
    for name in plan.keep:
        if name in plan.groups:
            members = {k.split("|")[1]: v for k, v in plan.index.items() if k.split("|")[0] == name}
            for unit in (~plan.keep[name]).nonzero().flatten().tolist():
                mask = unit_mask(layout, members, unit)
                taken |= mask
                found.append((name if len(plan.keep[name]) == 1 else f"{name} {unit}", mask.nonzero().flatten()))
    spans = {entry.name: entry for entry in layout}
    for name, keep in plan.keep.items():
        if name not in plan.groups:
            entry = spans[name]
            numbers = torch.arange(entry.span.start, entry.span.stop).view(entry.shape)
            for row in range(entry.shape[0]):
                gone = numbers[row][~keep[row]]
                if len(gone):
                    taken[gone] = True
                    found.append((f"{name}[{row}]", gone))
    moved = torch.zeros(layout.total, dtype=torch.bool)
    for jump in path.jumps:
        moved |= (jump.end != jump.start).cpu()
    for layer, parts in layers_of(layout).items():
        left = torch.cat([torch.arange(s.start, s.stop)[(moved & ~taken)[s]] for s in parts])
        if len(left):
            found.append((f"{layer}, kept weights", left))
    return found


def _blame(
    function: ModelFunction,
    jumps: tuple[Segment, ...],
    x: Inputs,
    against: Labels,
    samples: int,
    groups: list[tuple[str, Tensor]],
    nodes: int,
    memory: int,
) -> tuple[Tensor, Tensor]:
    """Blame by group and by layer, ``(samples, groups)`` and ``(samples, layers)``, float64 on the CPU."""
    layout, layers = function.layout, layers_of(function.layout)
    if not samples:
        return torch.zeros(0, len(groups), dtype=torch.float64), torch.zeros(0, len(layers), dtype=torch.float64)
    count = torch.zeros(layout.total, dtype=torch.float64)
    for _, where in groups:
        count[where] += 1
    rows = []
    with Bar("blame (samples × pieces)", samples * len(jumps)) as bar:
        for flat in _scores(function, jumps, x, against, samples, nodes, memory, bar):
            by_group = [(flat[:, where] / count[where]).sum(1) for _, where in groups]
            by_layer = [sum((flat[:, s].sum(1) for s in spans), flat.new_zeros(len(flat))) for spans in layers.values()]
            rows.append(torch.stack([*by_group, *by_layer], 1))
    both = torch.cat(rows)
    return both[:, : len(groups)], both[:, len(groups) :]


def _scores(
    function: ModelFunction,
    jumps: tuple[Segment, ...],
    x: Inputs,
    against: Labels,
    count: int,
    nodes: int,
    memory: int,
    bar: Bar,
) -> Iterator[Tensor]:
    """``-∫ ∂_i m dθ_i`` of every coordinate, buffers too, ``(samples, P)``, some samples at a time."""
    layout, state = function.layout, jumps[0].start.to(function.device)
    only_parameters = len(layout.parameters) == len(layout.entries)
    engine: GradientEngine = choose_engine(function, state, x, against) if only_parameters else VmapGradients(function)
    for samples, _ in chunks(count, 1, layout.total * state.element_size(), memory):
        rows = samples.stop - samples.start
        flat = state.new_zeros(rows, layout.total)
        into = {e.name: flat[:, e.span].view(rows, 1, *e.shape) for e in layout}
        part = take(x, samples, count), take(against, samples, count)
        for jump in jumps:
            start, end = jump.start.to(function.device), jump.end.to(function.device)
            for node, weight in get_rule("midpoint", nodes):
                scale = layout.views((start - end) * weight)
                engine.accumulate(torch.lerp(start, end, node), *part, scale, into)
            bar.advance(rows)
        yield flat.double().cpu()
