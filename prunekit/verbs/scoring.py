"""score: what finds out which weights matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from prunekit import checkpoint, trust
from prunekit.criteria import (
    Evidence,
    Scores,
    Spec,
    check_options,
    compose,
    expand,
    get_criterion,
    parse,
    provenance,
    score_evidence,
)
from prunekit.errors import PrunekitError
from prunekit.reusing import recorded_inputs, reusable
from prunekit.verbs.run_folder import Run


def score_run(
    run: Run,
    criteria: Sequence[str],
    overwrite: bool = False,
    evidence: Evidence | None = None,
    max_error: float | None = None,
) -> list[dict[str, Any]]:
    """Writes a score file for each criterion; ``all`` stands for the recipe's list.

    Parts of compositions are scored first; a part's file that is still right is reused, ``overwrite`` or not.

    Args:
        evidence: the run's with other options; the run's own by default.
        max_error: refuse influence scores whose estimated relative error is larger.

    Raises:
        UsageError: unknown criterion.
        PrunekitError: a criterion lacks its path or its data; nothing is written then.
    """
    evidence = evidence or run.evidence
    check_options(evidence)
    asked = [name for c in criteria for listed in (run.recipe.score.criteria if c == "all" else [c]) for name in expand(listed)]
    specs = list(dict.fromkeys(parse(name) for name in asked))
    singles = list(dict.fromkeys(part.text for spec in specs for part in spec.singles))
    wanted = {name: provenance(evidence, name) for name in singles}  # of all, before anything is written
    verify = cache(run.trajectory.verify)
    done = {}
    for name in singles:
        anew = overwrite and (name in asked or recorded_inputs(run.score_path(name), _provenance) != wanted[name])
        done[name] = _score_one(run, evidence, name, wanted[name], anew, max_error, verify)
    for spec in specs:
        if spec.text not in done:
            done[spec.text] = _compose(run, spec, overwrite)
    order = [name for spec in specs for name in (*(part.text for part in spec.singles), spec.text)]
    return [done[name] for name in dict.fromkeys(order)]


def _score_one(
    run: Run,
    evidence: Evidence,
    name: str,
    wanted: Mapping[str, Any],
    overwrite: bool,
    max_error: float | None,
    verify: Callable[[], None],
) -> dict[str, Any]:
    path = run.score_path(name)
    reused = reusable(path, recorded_inputs(path, _provenance), wanted, overwrite)
    if not reused:
        if get_criterion(name).needs_path:
            verify()
        partial = path.with_name(f".{path.stem}.partial.safetensors")  # finished chunks, should the work be cut off
        scores = score_evidence(replace(evidence, partial=partial), name)
        _check_error(name, scores.findings, max_error)
        scores.save(path)
        trust.used(scores.every_provenance)
    header = checkpoint.read_header(path, "scores")
    _check_error(name, header["findings"], max_error)
    return _result(path, header, reused)


def _compose(run: Run, spec: Spec, overwrite: bool) -> dict[str, Any]:
    """A composed file from its parts' files, which lie there already."""
    path = run.score_path(spec.text)
    scores = compose(spec, {part.text: run.scores(part.text) for part in spec.singles})
    reused = reusable(path, recorded_inputs(path, _provenance), scores.provenance, overwrite)
    if not reused:
        scores.save(path)
        trust.used(scores.every_provenance)
    return _result(path, checkpoint.read_header(path, "scores"), reused)


def _result(path: Path, header: Mapping[str, Any], reused: bool) -> dict[str, Any]:
    return {
        "criterion": header["provenance"]["criterion"], "path": str(path), "digest": header["digest"],
        "findings": header["findings"], **header["cost"], "reused": reused,
    }  # fmt: skip


def _check_error(name: str, findings: Mapping[str, Any], limit: float | None) -> None:
    error = findings.get("error")
    if limit is not None and error is not None and error["relative"] > limit:
        raise PrunekitError(
            f"scores of {name} have an estimated relative error of {error['relative']:.3g}, more than {limit:g}: give "
            "more --nodes, or --quadrature reconstruction with a smaller --tolerance; nothing was written"
        )


def _provenance(path: Path) -> dict[str, Any]:
    return Scores.load(path).provenance
