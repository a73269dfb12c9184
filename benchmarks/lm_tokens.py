"""How far a learnt mask comes with more tokens, smaller batches or whole moments, beside ADMM, which changes weights.

    python benchmarks/lm_tokens.py RUN [RUN …] [--structure 2:4] [--tokens 200k 800k 3.2M] [--batch 8] [--whole]

RUN is a run of a language model, of two seeds for instance (``prunekit train recipes/lm-comparison/small-gpt2.yaml --seed 1 --out
RUN``). Masks are learnt from Wanda's plan of 256 windows, which ADMM looks at too; figures are KL to the dense model in nats a
token on test data, and in brackets the share of ADMM's. Nothing is chosen by them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from prunekit import make_plan, prune_layerwise, refine
from prunekit.apply import masked
from prunekit.criteria import score_gathered
from prunekit.recipe.values import parse_count
from prunekit.repair.streamed import Streaming
from prunekit.structure import implied_sparsity
from prunekit.task.evaluation import References, evaluate
from prunekit.verbs.run_folder import Run

WINDOWS = 256


def measured(run: Run, structure: str, sparsity: float | None, streams: list[Streaming]) -> list[float]:
    """KL of ADMM's model, then of a mask by each stream."""
    train, test = run.batches("train"), run.batches("test")
    few, judges, task = train.first(WINDOWS), run.batches("scoring"), run.task
    references = References.of_many(run.model, test, task)
    scores = score_gathered(replace(run.evidence, data=few), "wanda")
    plan = make_plan(scores, run.model, sparsity=sparsity, structure=structure)
    ignore = run.recipe.prunable.ignore
    models = [prune_layerwise(run.model, few, method="admm", sparsity=sparsity, structure=structure, ignore=ignore, task=task)[1]]
    for stream in streams:
        models.append(masked(run.model, refine(plan, run.model, train, accept=judges, task=task, stream=stream)))
    return [evaluate(model, test, task, references).figures()["kl"] for model in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--structure", default="2:4")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--tokens", nargs="+", default=["200k", "800k", "3.2M"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--whole", action="store_true", help="Adam's moments whole, not factored")
    asked = parser.parse_args()
    if asked.sparsity is None and implied_sparsity(asked.structure) is None:
        parser.error("--sparsity is needed")
    streams = [Streaming(parse_count(tokens), asked.batch, looks=4, lean=not asked.whole) for tokens in asked.tokens]
    print(f"| run | ADMM | {' | '.join(asked.tokens)} |")
    print("|---|---|" + "---|" * len(streams))
    for path in asked.runs:
        admm, *masks = measured(Run(path), asked.structure, asked.sparsity, streams)
        print(f"| {path} | {admm:.5f} | {' | '.join(f'{kl:.5f} ({kl / admm:.2f})' for kl in masks)} |", flush=True)


if __name__ == "__main__":
    main()
