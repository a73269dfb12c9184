"""latency: how fast a run's model is, or a pruned one beside it, before anything is pruned or evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import UsageError
from prunekit.measure import conditions, machine, threads, timed
from prunekit.verbs.budgets import LONG, batch_of
from prunekit.verbs.language import generated
from prunekit.verbs.pruned_folder import open_pruned, run_of
from prunekit.verbs.run_folder import Run


def run_and_pruned(path: Path) -> tuple[Path, Path | None]:
    """The run folder, and the pruned model's folder where ``path`` is one.

    Raises:
        UsageError: it is neither.
    """
    if (path / "recipe.yaml").exists():
        return path, None
    try:
        return run_of(path), path
    except UsageError:
        raise UsageError(f"{path}: neither a run folder (no recipe.yaml) nor RUN/pruned/NAME inside one") from None


def time_run(run: Run, pruned: Path | None, batches: Sequence[int], count: int | None) -> dict[str, Any]:
    """Times the dense model, and a pruned one beside it.

    Args:
        pruned: folder of the pruned model; None for the dense model alone.
        batches: sizes; the recipe's ``eval.latency_batches`` where there are none.
        count: threads; None for the recipe's.

    Returns:
        ``machine``, ``conditions``, ``device``, and by batch size: ``rounds``, ``noisy``, and of ``dense``, ``pruned``
        (milliseconds) and ``speedup`` each ``median``, ``low``, ``high``; of a causal language model ``generation``.

    Raises:
        UsageError: a batch of no samples.
        ArtifactError: the pruned model is damaged, or another run's.
    """
    if any(size < 1 for size in batches):
        raise UsageError(f"--batch is {','.join(map(str, batches))}; a batch has one sample at least")
    models = {"dense": run.model.to(run.device)}
    if pruned is not None:
        models["pruned"] = open_pruned(run, pruned)[2].to(run.device)
    found: dict[str, Any] = {}
    with threads(count):
        for size in batches or run.recipe.eval.latency_batches:
            timing = timed(models, batch_of(run, size), LONG)
            parts = {name: timing.ms(name) for name in models}
            if pruned is not None:
                parts["speedup"] = timing.speedup("pruned")
            found[str(size)] = {
                "rounds": len(timing.rounds["dense"]),
                "noisy": parts.get("speedup", parts["dense"]).noisy,
                **{name: part.told() for name, part in parts.items()},
            }
        pace = generated(run, models, batches)
        where = machine(run.device)
    told = {"machine": where, "device": str(run.device), "conditions": conditions(), "batches": found}
    if pace is not None:
        told["generation"] = pace
    return {"name": pruned.resolve().name if pruned is not None else "dense", **told}
