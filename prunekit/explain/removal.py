"""What a mask's removal is to blame for: the divergence from the dense model by layer, class, unit and sample.

With ``J(θ) = mean_n D(dense ‖ θ)`` over samples, D the task's divergence (KL of classes), and ``m`` a mask,
``J(m ⊙ θ) = Σ_i blame_i`` over what ``m`` removes (``prunekit.kernel.blame``). Taken class by class that is a table, whose rows
and columns add up to the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.batch import Batch, Inputs, Labels, size, split, taken, to
from prunekit.errors import UsageError
from prunekit.explain.answers import AT_A_TIME, answers_of, class_labels, divergence_name, label_of, outputs_at
from prunekit.explain.path import JUMP_NODES, SCHEMA
from prunekit.kernel import ModelFunction, blame, layers_of, step_scores
from prunekit.plan import Plan
from prunekit.progress import Bar
from prunekit.repair.swaps import Swaps, get_swaps
from prunekit.task import Task, get_task
from prunekit.trajectory import Layout, Segment, Trajectory

NAMED = 6  # units told of
ASKING = 6  # samples told of each


@dataclass(frozen=True)
class Removal:
    """What one mask costs.

    Attributes:
        keep: flat ``(P,)`` of bool.
        divergence: ``J`` of the masked model.
        residual: what the nodes leave unexplained of it: ``divergence - table.sum()``.
        table: blame of each class's samples through each layer, ``(classes, layers)``, float64: their share in the mean
            over all samples.
        part: the same of the coordinates that were asked about.
        of_class: ``J`` over each class's own samples.
        values: blame of every coordinate, ``(P,)``, float64.
    """

    keep: Tensor
    divergence: float
    residual: float
    table: Tensor
    part: Tensor
    of_class: list[float]
    values: Tensor


class RemovalEffect:
    """Samples on which masks of one dense model are blamed.

    Args:
        x, y: samples and labels; of labels only classes, and which places count, are looked at.
        nodes: midpoints of the straight segment to the masked model.
        task: what the model is for; classification when None.
    """

    def __init__(
        self,
        model: nn.Module,
        trajectory: Trajectory,
        x: Inputs,
        y: Labels,
        nodes: int = JUMP_NODES,
        device: torch.device | str = "cpu",
        task: str | Task | None = None,
    ) -> None:
        self.layout, self.nodes, self.task = trajectory.layout, nodes, get_task(task)
        divergence = self.task.divergence
        self.function = ModelFunction(model, self.layout, trajectory.fixed, divergence, device, task=self.task)
        self.theta = trajectory.state(-1).to(self.function.device)
        self.x, self.y = to(x, self.function.device), to(y, self.function.device)
        self.count = size(self.x)
        self.dense = self.raw(self.theta)
        self.batch: Batch = self.x, (self.task.reference(self.dense), self.y)
        self.labels = class_labels(self.task, self.dense, self.y)
        self.classifies = self.labels is not None
        self.classes: list[int | None] = [None] if self.labels is None else sorted(set(self.labels.tolist()))

    def raw(self, state: Tensor) -> Tensor:
        """The model's outputs in any state."""
        return outputs_at(self.function, state, self.x, self.y)

    def label(self, k: int) -> Any:
        """A sample's label as JSON values."""
        return label_of(self.y, k, self.count) if self.labels is None else int(self.labels[k])

    def segment(self, keep: Tensor) -> Segment:
        """The straight way from the dense weights to the masked ones."""
        end = self.theta * keep.to(self.theta)
        return Segment(0, self.theta, end, torch.zeros_like(end), jump=True)

    def mask(self, plan: Plan) -> Tensor:
        plan.only_zeros("explain")
        return flat_mask(plan, self.layout).to(self.theta.device)

    def of(self, keep: Tensor, part: Tensor) -> Removal:
        """The blame of everything that a mask removes, and of ``part`` of it; both ``(P,)`` of bool."""
        step, rows, parts, of_class = self.segment(keep), [], [], []
        values = torch.zeros(self.layout.total, dtype=torch.float64, device=keep.device)
        whole = residual = 0.0
        with Bar("blame (classes)", len(self.classes)) as bar:
            for label in self.classes:
                own_batch, samples = self.batch, self.count
                if self.labels is not None and label is not None:
                    mine = torch.eq(self.labels, label).nonzero()[:, 0]
                    own_batch, samples = taken(self.batch, mine), len(mine)
                found = blame(self.function, step, list(split(own_batch, AT_A_TIME)), nodes=self.nodes)
                share = samples / self.count
                own = found.values.double() * share
                values += own
                rows.append(self._by_layer(own))
                parts.append(self._by_layer(own * part))
                of_class.append(found.change)
                whole, residual = whole + share * found.change, residual + share * found.residual
                bar.advance()
        return Removal(keep, whole, residual, torch.stack(rows), torch.stack(parts), of_class, values)

    def _by_layer(self, values: Tensor) -> Tensor:
        """``(P,) -> (layers,)``: sums over each layer's coordinates."""
        return torch.stack([torch.cat([values[span] for span in spans]).sum() for spans in layers_of(self.layout).values()])

    def by_sample(self, keep: Tensor, weights: Tensor) -> Tensor:
        """Each sample's own blame on what ``weights`` ``(P,)`` selects of a removal, ``(samples,)``; their mean is the unit's."""
        step = self.segment(keep)
        return torch.cat(
            [
                step_scores(self.function, [step], x, r, share="whole", only=weights, nodes=self.nodes)[0, :, 0]
                for x, r in split(self.batch, AT_A_TIME)
            ]
        ).double()


def flat_mask(plan: Plan, layout: Layout) -> Tensor:
    """A plan's masks in the path's coordinates, ``(P,)`` of bool; what it does not speak of stays."""
    masks = plan.masks()
    return torch.cat([masks[e.name].flatten() if e.name in masks else torch.ones(e.size, dtype=torch.bool) for e in layout])


def explain_removal(effect: RemovalEffect, name: str, plan: Plan, indices: Sequence[int]) -> dict[str, Any]:
    """What a pruned model's mask is to blame for; of a refined one, before and after, and who asked for what came back.

    Args:
        indices: numbers of the samples in their split.

    Returns:
        ``before`` (None without a record of it) and ``after``: ``divergence`` and its ``residual``, blame by ``layers``, by
        ``classes`` and by both in ``table``, and in ``part`` of what came back; ``units``: the most blamed that came back,
        as the mask before was without them, each with the ``samples`` that blame it most (of an unrefined plan, the most
        blamed that are gone); ``moved``: how many units came ``back`` and went ``out``.
    """
    given = plan.before
    kept = effect.mask(plan)
    nothing = torch.zeros_like(kept)
    after, before = effect.of(kept, nothing), None
    if given is not None:
        earlier = effect.mask(given)
        before = effect.of(earlier, kept & ~earlier)
    result: dict[str, Any] = {
        **_head(effect, name, "", f"what {name} removes"),
        "what": "pruned",
        "structure": plan.structure,
        "before": None if before is None else _told(effect, before),
        "after": _told(effect, after),
        "refine": plan.provenance.get("refine"),
        "refined_again": len(plan.provenance.get("refine_again", ())),
        "by_layers": plan.provenance.get("refine") is None and plan.provenance.get("layerwise", {}).get("changes", False),
        "moved": None,
        "units": [],
    }
    swaps = _swaps(effect, given or plan)
    if swaps is not None:
        shown = ~swaps.keep
        if given is not None:
            now = get_swaps(plan, effect.layout, effect.theta.device).keep
            result["moved"] = {"back": int((now & shown).sum()), "out": int((swaps.keep & ~now).sum())}
            shown = shown & now
        result["units"] = _units(effect, before or after, given or plan, swaps, shown, indices)
    return result


def explain_removals(
    effect: RemovalEffect, first: tuple[str, Plan], second: tuple[str, Plan], indices: Sequence[int]
) -> dict[str, Any]:
    """Two masks of one dense model: the blame of each, and of what only one of them removes.

    Returns:
        ``masks``: for each its ``name``, what ``explain_removal`` says of a mask, with ``part`` that which the other one keeps,
        ``alone`` (how many coordinates that is) and its most blamed ``units``, where both plans decide on the same ones;
        ``both``: how many coordinates both remove. The divergences differ by the parts' difference, and by that of what both
        remove, up to the residuals.
    """
    kept = [effect.mask(plan) for _, plan in (first, second)]
    patterns = [_swaps(effect, plan) for _, plan in (first, second)]
    same = first[1].structure == second[1].structure
    masks = []
    for (name, plan), (mine, other), (swaps, others) in zip(
        (first, second), (kept, kept[::-1]), (patterns, patterns[::-1]), strict=True
    ):
        removal = effect.of(mine, ~mine & other)
        units = []
        if same and swaps is not None and others is not None:
            units = _units(effect, removal, plan, swaps, ~swaps.keep & others.keep, indices)
        masks.append({"name": name, **_told(effect, removal), "alone": int((~mine & other).sum()), "units": units})
    return {
        **_head(effect, first[0], second[0], f"{first[0]} against {second[0]}"),
        "what": "diff",
        "both": int((~kept[0] & ~kept[1]).sum()),
        "masks": masks,
    }


def units_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All units that an explanation tells of with their samples, in the order of its page."""
    return [unit for mask in (result, *result.get("masks", ())) for unit in mask.get("units", ())]


def _head(effect: RemovalEffect, name: str, index: str, title: str) -> dict[str, Any]:
    name_of = divergence_name(effect.task)
    return {
        "schema": SCHEMA, "kind": "explanation", "name": name, "index": index, "title": title, "samples": effect.count,
        "nodes": effect.nodes, **({} if name_of is None else {"divergence_is": name_of}),
    }  # fmt: skip


def _told(effect: RemovalEffect, removal: Removal) -> dict[str, Any]:
    def sums(table: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {
            "blame": float(table.sum()),
            "layers": [
                {"layer": layer, "blame": blamed}
                for layer, blamed in zip(layers_of(effect.layout), table.sum(0).tolist(), strict=True)
            ],
        }
        if effect.classifies:
            found["classes"] = [
                {"class": c, "blame": blamed} for c, blamed in zip(effect.classes, table.sum(1).tolist(), strict=True)
            ]
        return found

    told = {"divergence": removal.divergence, "residual": removal.residual, **sums(removal.table), "part": sums(removal.part)}
    for row, own in zip(told.get("classes", ()), removal.of_class, strict=False):
        assert effect.labels is not None
        row |= {"samples": int((effect.labels == row["class"]).sum()), "divergence": own}
    return {**told, "table": removal.table.tolist()}


def _swaps(effect: RemovalEffect, plan: Plan) -> Swaps | None:
    """How the plan's units lie in the path's coordinates; None where they are of two kinds (pruned twice) or partly beside it."""
    try:
        return get_swaps(plan, effect.layout, effect.theta.device)
    except UsageError:
        return None


def _units(
    effect: RemovalEffect, removal: Removal, plan: Plan, swaps: Swaps, shown: Tensor, indices: Sequence[int]
) -> list[dict[str, Any]]:
    """The most blamed of the removed units ``shown`` ``(U,)``, and whose samples blame them."""
    blamed = swaps.gather(removal.values, swaps.keep).masked_fill(~shown, -torch.inf)
    order = [u for u in blamed.argsort(descending=True, stable=True)[:NAMED].tolist() if blamed[u] > 0]
    answers = {}
    if effect.classifies:
        masked = effect.raw(effect.theta * removal.keep.to(effect.theta))
        answers = {
            "dense": answers_of(effect.task, effect.dense, effect.y), "masked": answers_of(effect.task, masked, effect.y)
        }  # fmt: skip
    found = []
    with Bar("who asked (units)", len(order)) as bar:
        for unit in order:
            probe = removal.values.detach().requires_grad_()  # a unit's share of every coordinate: its blame is linear in theirs
            weights = torch.autograd.grad(swaps.gather(probe, swaps.keep)[unit], probe)[0]
            scores = effect.by_sample(removal.keep, weights)
            asking = [k for k in scores.argsort(descending=True, stable=True)[:ASKING].tolist() if scores[k] > 0]
            rows = [
                {
                    "index": indices[k], "label": effect.label(k), "blame": float(scores[k]),
                    **{model: given[k] for model, given in answers.items()},
                }
                for k in asking
            ]  # fmt: skip
            found.append({"name": _name(effect.layout, plan, unit, weights), "blame": float(blamed[unit]), "samples": rows})
            bar.advance()
    return found


def _name(layout: Layout, plan: Plan, unit: int, weights: Tensor) -> str:
    """A group and number inside it, or a weight and its place; a tile of weights by its first."""
    if plan.groups:
        for name, keep in plan.keep.items():
            if unit < len(keep):
                return name if len(keep) == 1 else f"{name} {unit}"
            unit -= len(keep)
    where = weights.nonzero().flatten().cpu()
    entry = next(e for e in layout if e.span.start <= int(where[0]) < e.span.stop)
    place = torch.unravel_index(where[0] - entry.span.start, entry.shape)
    text = f"{entry.name}[{','.join(str(int(i)) for i in place)}]"
    return text if len(where) == 1 else f"tile at {text}"
