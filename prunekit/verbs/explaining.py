"""explain: which samples are wrong and why, what a part or a sample gave and got, and what a pruning changed, from the kernel."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from typing import Any

from prunekit.apply import dense_state
from prunekit.batch import Inputs, Labels
from prunekit.criteria import model_digest
from prunekit.errors import PrunekitError, UsageError, nearest
from prunekit.explain import (
    PrunedPath,
    RemovalEffect,
    Training,
    coordinate_scores,
    explain_diff,
    explain_errors,
    explain_part,
    explain_ranking,
    explain_removal,
    explain_removals,
    explain_sample,
    explain_training_sample,
    find_part,
    flat_mask,
    inside,
)
from prunekit.explain.part import UNITS_OF, group_of
from prunekit.explain.path import JUMP_NODES
from prunekit.explain.ranking import RANKED
from prunekit.plan import Plan
from prunekit.structure import find_groups
from prunekit.trajectory import Continued, Segment
from prunekit.verbs.looking import Chosen, chosen_view, errors_of, numbered_view, units_of_run, view_of
from prunekit.verbs.pruned_folder import child_of, open_pruned
from prunekit.verbs.run_folder import Run
from prunekit.verbs.showing import add_texts, pictures_of

PARTS = ("weight", "channel", "head", "layer")
KINDS = ("errors", "sample", *PARTS, "pruned", "diff")
JUDGED = ("test", "validation", "scoring")
DIFF_SAMPLES = 64  # changed samples that are blamed one by one


def explain_run(
    run: Run,
    kind: str,
    name: str = "",
    index: str = "",
    *,
    split: str | None = None,
    samples: Chosen = None,
    target: str | None = None,
    position: int | None = None,
    limit: int | None = None,
    nodes: int | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Explains one thing and writes ``RUN/explain/<what it is>.html``.

    Args:
        kind: one of ``KINDS``; ``name`` and ``index`` say which: a parameter and one number an axis, a group and a unit, a
            layer, a sample's number, a pruned model (``diff``: or two). Without ``index`` the units of a group or the weights of
            a parameter are ranked, and without ``name`` the layers.
        split: whose samples are looked at; for ``sample``, the one that it belongs to. ``test`` by default, for ``pruned``
            those that refining looked at: ``scoring``.
        samples: the most that are looked at; ``eval.samples`` by default (``diff``: all are compared, these are blamed;
            ``pruned``: ``score.samples``). Of a part or a ranking also ``errors``, or the samples' numbers.
        target: the number that is explained of a sample or of chosen ones, see ``prunekit.explain.ask``.
        position: of one token of a text, whose log-probability (or margin) is explained instead of the whole sample's target.
        limit: how many errors, or parts of each kind, are named.
        nodes: of a step of training, one by default unless there are few; of the pruning for ``pruned`` and ``diff``.
        only: names of pruned models to look at; all of the run's by default.

    What says nothing of a kind is not looked at: the command line offers each its own options alone (``prunekit.cli.explain``).

    Raises:
        UsageError: a name that does not exist; near names are offered.
        ArtifactError: a pruned model is damaged or of another run.
        PrunekitError: the run has no path, or lacks what the explanation needs.
    """
    from prunekit.report import write_explanation  # eval explains too, and needs no plotting library

    if kind not in KINDS:
        raise UsageError(f"explain {kind!r}: there is no such thing to explain; {nearest(kind, list(KINDS))}")
    allowed = (*JUDGED, "train") if kind in ("sample", "errors") else JUDGED
    split = split or ("scoring" if kind == "pruned" else "test")
    if split not in allowed:
        raise UsageError(f"--split is {split!r}; {nearest(split, list(allowed))}")
    if (target is not None or position is not None) and split == "train":
        option = f"--target is {target!r}" if target is not None else f"--position is {position}"
        raise UsageError(
            f"{option}; it says what is explained of samples and parts, not of a training sample, whose gifts to "
            "all classes are told"
        )
    pathless = kind in ("errors", "pruned") or (kind == "diff" and index)  # those need the dense weights alone
    if len(run.trajectory) == 0 and not pathless:
        raise PrunekitError(
            f"{run.path}: has one checkpoint and so no training path, which explain {kind} needs; what a pruning removed can be "
            f"told without: explain {run.path / 'pruned' / 'NAME'}, or explain {run.path} diff ONE OTHER"
        )
    started = time.perf_counter()
    named = RANKED if limit is None else limit
    if kind == "pruned":
        result = explain_pruned(run, name, split, _count(samples), nodes)
    elif kind == "diff" and index:
        result = _two(run, name, index, split, _count(samples), nodes)
    elif kind == "diff":
        result = _diff(run, name, split, DIFF_SAMPLES if samples is None else _count(samples) or 0, nodes)
    elif kind == "errors":
        result = explain_errors(errors_of(run, split), named)
    elif kind == "sample":
        paths = [pruned_path(run, n)[0] for n in _pruned(run, only)]
        number = _number(run, name, split)
        if split == "train":
            result = explain_training_sample(view_of(run, "test", _count(samples), nodes), number, _training(run), paths)
        else:
            view = numbered_view(run, split, [number], target, nodes, position)
            result = explain_sample(view, number, split, _training(run), paths, units_of_run(run), named)
    else:
        result = _parts(run, kind, name, index, split, samples, target, position, named, nodes, only)
    result["split"] = split
    result["made_from"] = {
        "trajectory": run.trajectory.hash,
        "model": model_digest(run.model),
        "samples": run.splits[split].digest(),
    }
    result["cost"] = {"seconds": round(time.perf_counter() - started, 3)}
    page = run.path / "explain" / f"{_slug(kind, name, index, split, samples, target, position)}.html"
    add_texts(run, result)
    write_explanation(page, result, pictures_of(run, result))
    return {**result, "path": str(page)}


def _count(samples: Chosen) -> int | None:
    assert samples is None or isinstance(samples, int)
    return samples


def _parts(
    run: Run,
    kind: str,
    name: str,
    index: str,
    split: str,
    samples: Chosen,
    target: str | None,
    position: int | None,
    limit: int,
    nodes: int | None,
    only: Sequence[str] | None,
) -> dict[str, Any]:
    """One part, with what it consists of; or all of a kind, ranked."""
    layout, mappings = run.trajectory.layout, run.recipe.structure.mappings()
    if not name or (kind != "layer" and not index):
        if only is not None:
            raise UsageError(f"--pruned is {', '.join(only)}; a ranking is of the trained model, give a {kind}'s number with it")
        units = {kind: find_groups(UNITS_OF[kind], run.model, run.example, mappings)} if kind in UNITS_OF else {}
        if kind in UNITS_OF:
            group_of(kind, name, units[kind])
        view, told = chosen_view(run, split, samples, target, nodes, position)
        return {**explain_ranking(view, kind, name, units, limit), **told}
    paths = [pruned_path(run, n)[0] for n in _pruned(run, only)]
    part = find_part(kind, name, index, layout, run.model, lambda: run.example, mappings)
    view, told = chosen_view(run, split, samples, target, nodes, position)
    found = explain_part(view, part, _training(run), paths)
    if kind != "weight":
        scores = coordinate_scores(view)
        found["inside"] = inside(scores, part, units_of_run(run) if kind == "layer" else {}, limit)
        found["completeness"] = scores.completeness
    return {**found, **told}


def pruned_path(run: Run, name: str) -> tuple[PrunedPath, Plan]:
    """A pruned model of the run as pieces of a path from the dense one, and its plan.

    Raises:
        ArtifactError: it is missing, damaged, or was made from another model than this run's.
    """
    folder = run.path / "pruned" / name
    manifest, plan, pruned = open_pruned(run, folder)
    layout, last = run.trajectory.layout, run.trajectory.state(-1)
    end = layout.flatten({k: v.cpu() for k, v in dense_state(pruned, plan, manifest.kept or None).items()}).to(last.dtype)
    jumps: tuple[Segment, ...] = (Segment(len(run.trajectory), last, end, end - last, jump=True),)
    if manifest.facts.get("finetune"):
        child = child_of(run, folder, plan, pruned)
        jumps = (Continued(run.trajectory, child).joint, *(s for s in child.segments() if s.jump))
    units = {group: decision for group, decision in plan.keep.items() if group in plan.groups}
    return PrunedPath(name, flat_mask(plan, layout), units, jumps, end), plan


def _pruned(run: Run, only: Sequence[str] | None) -> list[str]:
    known = sorted(path.parent.name for path in (run.path / "pruned").glob("[!.]*/prunekit.json"))
    for name in only or ():
        if name not in known:
            raise UsageError(f"pruned model {name!r} does not exist; {nearest(name, known) if known else 'the run has none'}")
    return known if only is None else list(only)


def _samples(run: Run, split: str, limit: int | None) -> tuple[Inputs, Labels]:
    found = run.batches(split, limit)
    return found.rows(0, len(found))


def _training(run: Run) -> Training:
    return Training(run.splits["train"].batch, run.task.loss)


def _diff(run: Run, name: str, split: str, limit: int, nodes: int | None) -> dict[str, Any]:
    _pruned(run, [name])
    path, plan = pruned_path(run, name)
    x, y = _samples(run, split, None)
    return explain_diff(
        run.model, run.trajectory, path, plan, x, y, limit=limit, nodes=nodes or JUMP_NODES, device=run.device, task=run.task
    )


def explain_pruned(
    run: Run, name: str, split: str = "scoring", samples: int | None = None, nodes: int | None = None
) -> dict[str, Any]:
    """What a pruned model's mask is to blame for, on scoring samples, which accept refined plans (``prunekit.explain.removal``).

    Raises:
        UsageError: the run has no such pruned model.
        ArtifactError: it is damaged, or was made from another model than this run's.
    """
    _pruned(run, [name])
    _, plan, _ = open_pruned(run, run.path / "pruned" / name)
    effect, indices = _effect(run, split, samples or run.recipe.score.samples, nodes, _classes(plan))
    return {**explain_removal(effect, name, plan, indices), "split": split}


def _two(run: Run, first: str, second: str, split: str, samples: int | None, nodes: int | None) -> dict[str, Any]:
    plans = {}
    for name in _pruned(run, [first, second]):
        _, plans[name], _ = open_pruned(run, run.path / "pruned" / name)
    if len(plans) == 1:
        raise UsageError(f"diff {first} {second}: a pruned model does not differ from itself")
    effect, indices = _effect(run, split, samples or run.looked_at, nodes)
    return explain_removals(effect, (first, plans[first]), (second, plans[second]), indices)


def _classes(plan: Plan) -> list[int]:
    """What the model was pruned for; empty for all."""
    return list(plan.provenance.get("request", {}).get("classes", ()))


def _effect(run: Run, split: str, limit: int, nodes: int | None, classes: Sequence[int] = ()) -> tuple[RemovalEffect, list[int]]:
    """The first ``limit`` samples of a split, of some classes only, and their numbers in it."""
    some = (run.restricted(classes) if classes else run).batches(split, limit)
    effect = RemovalEffect(run.model, run.trajectory, *some.rows(0, len(some)), nodes or JUMP_NODES, run.device, run.task)
    return effect, [int(i) for group in some.groups for i in group]


def _number(run: Run, text: str, split: str) -> int:
    size = len(run.splits[split])
    if not text.isdecimal() or int(text) >= size:
        others = [name for name in (*JUDGED, "train") if name != split and text.isdecimal() and int(text) < len(run.splits[name])]
        hint = f"; --split {others[0]} has one of that number" if others else ""
        raise UsageError(f"{split} sample {text!r} does not exist; there are {size}, numbered 0 to {size - 1}{hint}")
    return int(text)


def _slug(kind: str, name: str, index: str, split: str, samples: Chosen, target: str | None, position: int | None) -> str:
    parts = [kind, *([split] if kind in ("sample", "errors") else []), *(one for one in (name, index) if one)]
    if isinstance(samples, str):
        parts += [f"of-{samples}"]
    elif samples is not None and not isinstance(samples, int):
        numbers = "_".join(map(str, samples))
        parts += [
            f"of-{numbers}" if len(numbers) <= 40 else f"of-{len(samples)}-{hashlib.sha256(numbers.encode()).hexdigest()[:8]}"
        ]
    if target is not None:
        parts += [target]
    if position is not None:
        parts += [f"at-{position}"]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts)
