"""What is left to do with 64 windows of calibration text and nothing else: layer-wise methods against masks and weights learnt.

    python benchmarks/few_windows.py RUN [RUN …] [--windows 64] [--tokens 200k] [--sparsities 0.5 0.7 0.9] [--structures 2:4]
                                         [--only WAY …]

RUN is a run of a language model, of two seeds for instance (``prunekit compare recipes/lm-comparison-gpt2.yaml --out DIR``
leaves its runs in DIR/runs). Of its training data the first windows are taken, of its test data the figures: KL to the dense
model in nats a token, each run's and their mean. Layer-wise methods look at all windows. What learns goes over them again and
again: a mask from three quarters, judged on the last quarter, and the weights that are tuned under it from the same ones;
weights that are tuned under a given mask, or ADMM's, from all. ``divided`` does as ``prunekit prune --tokens`` would with
three quarters to train on and the last one as validation data: it tries a mask alone, mask and weights together, weights alone
and both together from ADMM by kfac's shares with a twentieth of the tokens each, spends what is left on the best, and takes
ADMM's model of the three quarters where the judges find it nearer to the dense one. Nothing was chosen by these test data.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from prunekit import Plan, make_plan
from prunekit.apply import masked
from prunekit.criteria import score_gathered
from prunekit.data import Samples
from prunekit.recipe.values import parse_count
from prunekit.repair.streamed import Streaming
from prunekit.search import streamed_ways as ways
from prunekit.search.ways import RepairSamples
from prunekit.structure import implied_sparsity
from prunekit.task.evaluation import References, evaluate
from prunekit.verbs.dividing import LAYERS_TOGETHER, LAYERWISE, MASK, TOGETHER, TRY, WEIGHTS
from prunekit.verbs.run_folder import Run

LEARNING = (
    "ADMM, then weights tuned", "weights tuned", "mask learnt", "mask learnt, then weights tuned", "divided",
    "mask and weights together",
)  # fmt: skip
JUDGED = 4
"""Of so many windows one judges."""


class Judge:
    """KL to the run's dense model, which answers once."""

    def __init__(self, run: Run, samples: Samples) -> None:
        self._task, self._samples, self._dense = run.task, samples, References(run.model, samples, run.task)

    def kl(self, model: nn.Module) -> float:
        found: float = evaluate(model, self._samples, self._task, self._dense).figures()["kl"]
        return found


def learnt(plan: Plan, run: Run, material: RepairSamples, share: float) -> nn.Module:
    """A mask, then weights, for which ``share`` of the tokens are."""
    found = plan if share == 1 else ways.streamed(plan, run.model, material, 1 - share)[0]
    made = ways.tuned(found, run.model, material, share)[1] if share else None
    return masked(run.model, found) if made is None else made


def divided(plan: Plan, run: Run, material: RepairSamples) -> tuple[nn.Module, str]:
    """What the tokens are best spent on by small tries, and which it was; or ADMM's model, where that is better."""
    how = ways.streaming(material)
    assert material.accept is not None
    small = replace(material, stream=replace(how, tokens=round(TRY * how.tokens), looks=2))
    judge = Judge(run, material.accept)
    shares = plan
    if plan.structure == "unstructured":
        scored = score_gathered(replace(run.evidence, data=material.train), "kfac")
        shares = make_plan(scored, run.model, sparsity=plan.provenance["sparsity"], allocation="global")
    admm, by_layers = ways.by_layers(shares, run.model, material, method=LAYERWISE.method)
    assert by_layers is not None
    spent: dict[str, Callable[[RepairSamples], nn.Module]] = {
        MASK: lambda material: learnt(plan, run, material, 0.0),
        TOGETHER: lambda material: _made(ways.together(plan, run.model, material)),
        WEIGHTS: lambda material: learnt(plan, run, material, 1.0),
        LAYERS_TOGETHER: lambda material: _made(ways.together(admm, run.model, material, by_layers)),
    }
    best = min(spent, key=lambda way: judge.kl(spent[way](small)))
    rest = replace(material, stream=replace(how, tokens=how.tokens - len(spent) * round(TRY * how.tokens)))
    made = spent[best](rest)
    if judge.kl(by_layers) < judge.kl(made):
        return by_layers, "ADMM"
    return made, best


def measured(
    run: Run, windows: int, tokens: int, structure: str, sparsity: float | None, only: list[str]
) -> Iterator[tuple[str, float, str]]:
    """Name of a way, KL on test data, and what else is to be said; of all ways where ``only`` names none."""
    few = run.batches("train").first(windows)
    apart = torch.arange(windows) % JUDGED == JUDGED - 1
    material = RepairSamples(
        run.evidence, few, few.where(apart), run.example, run.recipe.seed, Streaming(tokens=tokens, batch=8, looks=10)
    )
    learning = replace(material, given=few.where(~apart))
    scores = score_gathered(replace(run.evidence, data=few), "wanda")
    allocation = "rows" if structure == "unstructured" else "global"
    plan = make_plan(scores, run.model, sparsity=sparsity, structure=structure, allocation=allocation)
    test = Judge(run, run.batches("test"))

    def by(method: str) -> tuple[Plan, nn.Module]:
        found, made = ways.by_layers(plan, run.model, material, method=method)
        return found, masked(run.model, found) if made is None else made

    wanted = set(only or [*ways.BY_LAYERS, *LEARNING])
    layerwise = {name: by(name) for name in ways.BY_LAYERS if name in wanted or (name == "admm" and LEARNING[0] in wanted)}
    done: dict[str, Callable[[], tuple[nn.Module, str]]] = {
        LEARNING[0]: lambda: (
            _made(ways.tuned(layerwise["admm"][0], run.model, material, 1.0, layerwise["admm"][1])),
            "",
        ),
        LEARNING[1]: lambda: (learnt(plan, run, material, 1.0), ""),
        LEARNING[2]: lambda: (learnt(plan, run, learning, 0.0), ""),
        LEARNING[3]: lambda: (learnt(plan, run, learning, ways.SHARE), ""),
        LEARNING[4]: lambda: divided(plan, run, learning),
        LEARNING[5]: lambda: (_made(ways.together(plan, run.model, learning)), ""),
    }
    for name, (_, model) in layerwise.items():
        if name in wanted:
            yield name, test.kl(model), ""
    for name, work in done.items():
        if name in wanted:
            model, note = work()
            yield name, test.kl(model), note


def _made(found: ways.Found) -> nn.Module:
    assert found[1] is not None
    return found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=parse_count, default=200_000)
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--structures", nargs="*", default=["2:4"], help="patterns that say how much goes")
    parser.add_argument("--only", nargs="*", default=[], choices=[*ways.BY_LAYERS, *LEARNING], metavar="WAY")
    asked = parser.parse_args()
    cells = [("unstructured", sparsity) for sparsity in asked.sparsities]
    cells += [(name, implied_sparsity(name)) for name in asked.structures]
    print("| | way | KL, mean | of each run | |\n|---|---|---|---|---|")
    for structure, sparsity in cells:
        rows: dict[str, list[tuple[float, str]]] = {}
        for path in asked.runs:
            for name, found, note in measured(Run(path), asked.windows, asked.tokens, structure, sparsity, asked.only):
                rows.setdefault(name, []).append((found, note))
        for name, values in rows.items():
            each = ", ".join(f"{value:.4f}" for value, _ in values)
            notes = "; ".join(note for _, note in values if note)
            what = f"{sparsity:g}" if structure == "unstructured" else structure
            print(f"| {what} | {name} | {statistics.fmean(v for v, _ in values):.4f} | {each} | {notes} |", flush=True)


if __name__ == "__main__":
    main()
