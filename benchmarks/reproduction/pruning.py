"""The paper's pruning protocol: kernel influence, L1, one threshold for all layers, the classifier kept, no fine-tuning."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.outputs import fidelity, predict
from prunekit.apply import apply_masks
from prunekit.criteria import Evidence, score, score_evidence
from prunekit.data import Samples
from prunekit.plan.unstructured import unstructured_masks
from prunekit.verbs.run_folder import Run

from .common import log_probabilities, note, trained
from .common import table as markdown

KEEP = (0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.30)
CLASSIFIER = "classifier.weight"
FEW = 64  # scoring samples of the second table
ROUNDS = 12


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", default="digits-cnn-sgd", help="recipe (the paper: cifar2-resnet9)")
    parser.add_argument("--seeds", type=int, default=5, help="draws of scoring and test samples")
    parser.add_argument("--samples", type=int, default=160, help="scoring samples a seed")
    parser.add_argument("--test", type=int, default=360, help="test samples a seed")


def run(chosen: argparse.Namespace) -> str:
    case = trained(chosen.case, chosen.out)
    held = [case.splits[name].batch(range(len(case.splits[name]))) for name in ("validation", "test", "scoring")]
    x, y = torch.cat([h[0] for h in held]), torch.cat([h[1] for h in held])
    if len(x) < chosen.samples + chosen.test:
        raise SystemExit(f"{chosen.case} holds {len(x)} samples out of training, {chosen.samples} + {chosen.test} are asked for")
    found: dict[tuple[str, float, str], list[float]] = {}
    for seed in range(chosen.seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        scoring, test = order[: chosen.samples], order[chosen.samples : chosen.samples + chosen.test]
        for criterion in ("influence", "magnitude", "random"):
            pairs = [(x[scoring], y[scoring])]
            scores = score(case.trajectory, case.model, pairs, criterion, target=log_probabilities, seed=seed, device=case.device)
            for pool in ("", "classifier in the pool"):
                if criterion == "random" and pool:
                    continue
                for keep in KEEP:
                    masks = masks_of(scores.importance, keep, bool(pool))
                    for measure, value in measured(case.model, masks, x[test], y[test]).items():
                        found.setdefault((", ".join(filter(None, (criterion, pool))), keep, measure), []).append(value)
        note(f"seed {seed} of {chosen.seeds} done")
    lines = list(dict.fromkeys(name for name, _, _ in found))
    dense = fidelity(*predict(case.model, [(x, y)]), predict(case.model, [(x, y)])[0])["accuracy"]
    text = (
        f"{chosen.case}, one trained model (accuracy {100 * dense:.1f} % on all {len(x)} samples out of training), "
        f"{chosen.seeds} draws of {chosen.samples} scoring and {chosen.test} other test samples; mean ± standard deviation over "
        "draws. Kept: share of the pool that the threshold runs over, which is all weight matrices but the classifier's "
        "unless the column says otherwise; the classifier itself is kept whole in every column.\n"
    )
    for measure, title in (("agreement", "Same answer as the dense model, %"), ("kl", "KL to the dense model, nats")):
        factor, digits = (100, 1) if measure == "agreement" else (1, 3)
        rows = [[f"{keep:.2f}", *(spread(found[name, keep, measure], factor, digits) for name in lines)] for keep in KEEP]
        over_all = [statistics.mean(v for keep in KEEP for v in found[name, keep, measure]) for name in lines]
        rows.append(["mean", *(f"{factor * value:.{digits}f}" for value in over_all)])
        text += f"\n{title}:\n\n" + markdown(("kept", *lines), rows)
    return text + causes(case, x, y, chosen)


def causes(case: Run, x: Tensor, y: Tensor, chosen: argparse.Namespace) -> str:
    """Where influence loses to magnitude: in the layers' shares, in the order inside layers, or in the share of a step."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    scoring, test = order[: min(FEW, chosen.samples)], order[chosen.samples : chosen.samples + chosen.test]
    wanted = {name: {} for name in ("magnitude", "influence", "survival", "taylor")} | {
        "influence, whole steps": {"share": "whole"}, "influence, regularisation share": {"share": "regularisation"},
    }  # fmt: skip
    found = {}
    for line, more in wanted.items():
        scores = score(
            case.trajectory, case.model, [(x[scoring], y[scoring])], line.split(",")[0], target=log_probabilities,
            ignore=[CLASSIFIER], device=case.device, **more,
        )  # fmt: skip
        found[line] = scores.importance
        note(f"{line}: scored")
    levels = [keep for keep in KEEP if 0.05 <= keep <= 0.2]
    ways = {line: (importance, importance) for line, importance in found.items()}
    ways["influence inside layers, magnitude's layer shares"] = (found["influence"], found["magnitude"])
    ways["magnitude inside layers, influence's layer shares"] = (found["magnitude"], found["influence"])
    chosen_masks = {line: [ranked_masks(*way, keep) for keep in levels] for line, way in ways.items()}
    chosen_masks[f"taylor, scored again in {ROUNDS} steps"] = [
        rescored(case, (x[scoring], y[scoring]), list(found["taylor"]), keep) for keep in levels
    ]
    rows = []
    for line, masks in chosen_masks.items():
        agreements = [measured(case.model, m, x[test], y[test])["agreement"] for m in masks]
        shares = [f"{100 * float(mask.float().mean()):.0f}" for mask in masks[levels.index(0.10)].values()]
        rows.append([line, *(f"{100 * value:.1f}" for value in agreements), ", ".join(shares)])
    layers = ", ".join(name.removesuffix(".weight") for name in found["magnitude"])
    return (
        f"\nWhy: one draw, {len(scoring)} scoring samples, the classifier outside the pool; same answer as the dense model, %, "
        f"by share kept, and the shares that {layers} keep at 0.10.\n\n"
        + markdown(("order", *(f"{keep:.2f}" for keep in levels), "kept by layer at 0.10, %"), rows)
    )


def rescored(case: Run, pair: tuple[Tensor, Tensor], prunable: list[str], keep: float) -> dict[str, Tensor]:
    """Taylor's masks, reached in steps of one ratio, each scored on the weights that the last one left; none is updated."""
    evidence = Evidence(case.trajectory, case.model, tuple(prunable), Samples.held([pair]), device=case.device)
    masks: dict[str, Tensor] = {}
    for number in range(1, ROUNDS + 1):
        importance = score_evidence(evidence, "taylor").importance  # 0 where a weight is gone, so it stays gone
        masks = unstructured_masks(importance, 1 - keep ** (number / ROUNDS), same)
        state = evidence.state.clone()
        for name, view in case.trajectory.layout.views(state).items():
            if name in masks:
                view.mul_(masks[name])
        evidence = replace(evidence, at=state)
    return masks


def ranked_masks(inside: Mapping[str, Tensor], between: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """Each layer keeps as many weights as one threshold on ``between`` leaves it, those that are first by ``inside``."""
    shares = {name: float(mask.double().mean()) for name, mask in unstructured_masks(dict(between), 1 - keep, same).items()}
    return {name: unstructured_masks({name: inside[name]}, 1 - shares[name], same)[name] for name in inside}


def same(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    return importance


def masks_of(importance: Mapping[str, Tensor], keep: float, pooled: bool) -> dict[str, Tensor]:
    """Masks of all but the classifier; ``pooled``: its weights take part in finding the threshold."""
    pool = {name: v for name, v in importance.items() if pooled or name != CLASSIFIER}
    masks = unstructured_masks(pool, 1 - keep, same)
    return {name: mask for name, mask in masks.items() if name != CLASSIFIER}


def measured(model: nn.Module, masks: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Any]:
    pruned = copy.deepcopy(model)
    apply_masks(pruned, masks)
    return fidelity(*predict(pruned, [(x, y)]), predict(model, [(x, y)])[0])


def spread(values: list[float], factor: float, digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{factor * statistics.mean(values):.{digits}f} ± {factor * deviation:.{digits}f}"
