"""Whether a mask learnt in bfloat16, or beside a dense model in bfloat16, is as good as one learnt in single precision.

    python benchmarks/lm_precision.py RUN [RUN …] [--tokens 200k] [--sparsities 0.5 0.7 0.9]

RUN is a run of a language model, of two seeds for instance (``prunekit train recipes/lm-comparison/small-gpt2.yaml --seed 1 --out
RUN``). Masks are learnt from Wanda's plan, in batches of 8; figures are KL to the dense model in nats a token on test data, which
are computed in single precision throughout, and seconds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from prunekit import make_plan, refine
from prunekit.apply import masked
from prunekit.criteria import score_gathered
from prunekit.recipe.values import parse_count
from prunekit.repair.streamed import Streaming
from prunekit.task.evaluation import References, evaluate
from prunekit.verbs.run_folder import Run

PRECISIONS: dict[str, Any] = {"single": False, "reference": "reference", "bfloat16": True}
WINDOWS = 256
"""Training windows that Wanda looks at."""


def measured(run: Run, sparsity: float, tokens: int) -> dict[str, tuple[float, float]]:
    """By precision: KL on test data, and seconds of learning."""
    train, test, judges = run.batches("train"), run.batches("test"), run.batches("scoring")
    scores = score_gathered(replace(run.evidence, data=train.first(WINDOWS)), "wanda")
    plan = make_plan(scores, run.model, sparsity=sparsity, allocation="rows")
    references = References.of_many(run.model, test, run.task)
    found = {}
    for name, autocast in PRECISIONS.items():
        how, begun = Streaming(tokens=tokens, batch=8, looks=4, autocast=autocast), time.perf_counter()
        learnt = refine(plan, run.model, train, accept=judges, task=run.task, stream=how)
        seconds = time.perf_counter() - begun
        found[name] = evaluate(masked(run.model, learnt), test, run.task, references).figures()["kl"], seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--tokens", default="200k", type=parse_count)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    asked = parser.parse_args()
    print(f"| run | sparsity | {' | '.join(f'{name}, KL (s)' for name in PRECISIONS)} |")
    print("|---|---|" + "---|" * len(PRECISIONS))
    for path in asked.runs:
        for sparsity in asked.sparsities:
            found = measured(Run(path), sparsity, asked.tokens)
            print(f"| {path} | {sparsity} | {' | '.join(f'{kl:.5f} ({s:.0f})' for kl, s in found.values())} |", flush=True)


if __name__ == "__main__":
    main()
