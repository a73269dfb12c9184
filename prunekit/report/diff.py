"""Dense against pruned: which samples changed their answer, and which removed groups did that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import UsageError
from prunekit.kernel import ModelFunction, get_rule, layers_of
from prunekit.kernel.attribution import MEMORY, chunks
from prunekit.kernel.gradients import GradientEngine, VmapGradients, choose_engine
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.report.explain import JUMP_NODES, SCHEMA, PrunedPath
from prunekit.report.parts import unit_mask
from prunekit.trajectory import Layout, Segment, Trajectory

AT_A_TIME = 256
NAMED = 6  # groups named for each sample


def answer_margin(out: Tensor, pair: Tensor) -> Tensor:
    """The first answer's output less the second's, ``(samples, 1)``; ``pair`` ``(samples, 2)`` holds both classes."""
    return out.gather(1, pair[:, :1]) - out.gather(1, pair[:, 1:])


def explain_diff(
    model: nn.Module,
    trajectory: Trajectory,
    path: PrunedPath,
    plan: Plan,
    x: Tensor,
    y: Tensor,
    *,
    limit: int,
    nodes: int = JUMP_NODES,
    memory: int = MEMORY,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Blames removed groups for changed answers.

    With ``m(x)`` the dense answer's output less the pruned answer's, pruning lowers ``m`` from above 0 to below it. Along the
    pruning's straight pieces that is ``Σ_i blame_i = -Σ_i ∫ ∂_i m dθ_i``, exactly; a group's blame is the sum over what leaves
    with it. A coordinate that leaves with several groups counts for each in equal parts, so groups add up to the whole.

    Args:
        x, y: samples and labels of a classifier.
        limit: blame is told for so many changed samples, those whose margin fell furthest.
        nodes: midpoints of every piece of the pruning.

    Raises:
        UsageError: the model is no classifier of single labels.
    """
    function = ModelFunction(model, trajectory.layout, trajectory.fixed, "outputs", device)
    x, y = x.to(function.device), y.to(function.device)
    dense, pruned = (_outputs(function, state, x, y) for state in (trajectory.state(-1), path.end))
    if y.dim() != 1 or y.dtype != torch.int64 or dense.shape[1] < 2 or int(y.max()) >= dense.shape[1]:
        raise UsageError(
            f"diff compares classes; this model has {dense.shape[1]} outputs for labels {tuple(y.shape)} of {y.dtype}"
        )
    before, after = dense.argmax(1), pruned.argmax(1)
    changed = (before != after).nonzero()[:, 0]
    pair = torch.stack([before, after], 1)
    fall = (answer_margin(dense, pair) - answer_margin(pruned, pair))[:, 0].double()
    shown = changed[fall[changed].argsort(descending=True, stable=True)][:limit]
    groups = _groups(plan, path, trajectory.layout)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "explanation",
        "what": "diff",
        "name": path.name,
        "index": "",
        "title": f"dense against {path.name}",
        "samples": len(x),
        "accuracy": {"dense": float((before == y).float().mean()), "pruned": float((after == y).float().mean())},
        "changed": {
            "all": len(changed), "right_to_wrong": int(((before == y) & (after != y)).sum()),
            "wrong_to_right": int(((before != y) & (after == y)).sum()),
            "wrong_to_wrong": int(((before != y) & (after != y) & (before != after)).sum()), "shown": len(shown),
        },
    }  # fmt: skip
    margins = function.narrowed(slice(None))
    margins.target = answer_margin
    blame, layers = _blame(margins, path.jumps, x[shown], pair[shown], groups, nodes, memory)
    through = torch.zeros(len(shown), dtype=torch.float64)
    with torch.no_grad():
        for jump in path.jumps:
            ends = [margins(s.to(function.device), x[shown], pair[shown])[:, 0].double().cpu() for s in (jump.start, jump.end)]
            through += ends[0] - ends[1]
        begins = margins(path.jumps[0].start.to(function.device), x[shown], pair[shown])[:, 0].double().cpu()
    rewound = answer_margin(dense, pair)[shown, 0].double().cpu() - begins
    residual = blame.sum(1) - through
    names = [name for name, _ in groups]
    top = blame.argsort(1, descending=True)[:, :NAMED].tolist()
    result["changes"] = [
        {
            "index": k, "label": int(y[k]), "dense": int(before[k]), "pruned": int(after[k]),
            "margin_dense": float(answer_margin(dense, pair)[k, 0]), "margin_pruned": float(answer_margin(pruned, pair)[k, 0]),
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


@torch.no_grad()
def _outputs(function: ModelFunction, state: Tensor, x: Tensor, y: Tensor) -> Tensor:
    state = state.to(function.device)
    return torch.cat([function(state, x[i : i + AT_A_TIME], y[i : i + AT_A_TIME]) for i in range(0, len(x), AT_A_TIME)])


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
    x: Tensor,
    pair: Tensor,
    groups: list[tuple[str, Tensor]],
    nodes: int,
    memory: int,
) -> tuple[Tensor, Tensor]:
    """Blame by group and by layer, ``(samples, groups)`` and ``(samples, layers)``, float64 on the CPU."""
    layout, layers = function.layout, layers_of(function.layout)
    if not len(x):
        return torch.zeros(0, len(groups), dtype=torch.float64), torch.zeros(0, len(layers), dtype=torch.float64)
    count = torch.zeros(layout.total, dtype=torch.float64)
    for _, where in groups:
        count[where] += 1
    rows = []
    with Bar("blame (samples × pieces)", len(x) * len(jumps)) as bar:
        for flat in _scores(function, jumps, x, pair, nodes, memory, bar):
            by_group = [(flat[:, where] / count[where]).sum(1) for _, where in groups]
            by_layer = [sum((flat[:, s].sum(1) for s in spans), flat.new_zeros(len(flat))) for spans in layers.values()]
            rows.append(torch.stack([*by_group, *by_layer], 1))
    both = torch.cat(rows)
    return both[:, : len(groups)], both[:, len(groups) :]


def _scores(
    function: ModelFunction, jumps: tuple[Segment, ...], x: Tensor, pair: Tensor, nodes: int, memory: int, bar: Bar
) -> Iterator[Tensor]:
    """``-∫ ∂_i m dθ_i`` of every coordinate, buffers too, ``(samples, P)``, some samples at a time."""
    layout, state = function.layout, jumps[0].start.to(function.device)
    only_parameters = len(layout.parameters) == len(layout.entries)
    engine: GradientEngine = choose_engine(function, state, x, pair) if only_parameters else VmapGradients(function)
    for samples, _ in chunks(len(x), 1, layout.total * state.element_size(), memory):
        size = samples.stop - samples.start
        flat = state.new_zeros(size, layout.total)
        into = {e.name: flat[:, e.span].view(size, 1, *e.shape) for e in layout}
        for jump in jumps:
            start, end = jump.start.to(function.device), jump.end.to(function.device)
            for node, weight in get_rule("midpoint", nodes):
                scale = layout.views((start - end) * weight)
                engine.accumulate(torch.lerp(start, end, node), x[samples], pair[samples], scale, into)
            bar.advance(size)
        yield flat.double().cpu()
