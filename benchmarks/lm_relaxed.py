"""How far masks of N:M could come at all: beside ADMM, masks that may have any value between 0 and 1.

    python benchmarks/lm_relaxed.py RUN [RUN …] [--structure 2:4] [--tokens 200k 800k]

RUN is a run of a language model (``prunekit train recipes/lm-comparison/small-gpt2.yaml --seed 1 --out RUN``). A relaxed mask has
factors in [0, 1] that add up to N in every run of M inputs; it starts half way from N / M throughout to ADMM's mask and is learnt
by the divergence from the dense model, by Adam and a projection after every step, the rate falling to 0. It prunes nothing: masks
of N:M are among the relaxed ones, so that the best of these is no worse than the best of those. What is learnt comes near to the
best one with more tokens, from above. Figures are KL in nats a token on test data, and in brackets the share of ADMM's, which
changes weights and looks at 256 windows.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from prunekit import prune_layerwise
from prunekit.batch import call
from prunekit.recipe.values import parse_count
from prunekit.repair.stream import Stream
from prunekit.structure.roles import weight_roles
from prunekit.task.evaluation import References, evaluate
from prunekit.verbs.run_folder import Run

WINDOWS, BATCH, RATE, BETAS = 256, 8, 0.03, (0.9, 0.999)
HALVINGS = 25


def projected(values: Tensor, total: float) -> Tensor:
    """The nearest ``(…, M)`` of [0, 1] whose last axis adds up to ``total``: ``clamp(v - λ, 0, 1)``, λ by bisection."""
    low, high = values.amin(-1, keepdim=True) - 1, values.amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = (values - middle).clamp(0, 1).sum(-1, keepdim=True) > total
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (values - (low + high) / 2).clamp(0, 1)


def relaxed(run: Run, keep: Mapping[str, Tensor], stay: int, of: int, tokens: int) -> torch.nn.Module:
    """The model under the relaxed mask that so many tokens teach."""
    model = copy.deepcopy(run.model.eval()).requires_grad_(False)
    roles, weights = weight_roles(model), {name: model.get_parameter(name).requires_grad_() for name in keep}
    dense = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = {name: (mask + stay / of) / 2 for name, mask in keep.items()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in dense.items()} for _ in range(2))
    stream = Stream(run.batches("train"), BATCH)
    steps = stream.steps(tokens, "relaxed")
    for step, (x, y) in enumerate(islice(stream, steps)):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(dense[name] * masks[name])
            reference = run.task.reference(run.task.outputs(call(run.model, x)))
        run.task.divergence(run.task.outputs(call(model, x)), (reference, y)).sum().div(BATCH).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            gradient, weight.grad = weight.grad * dense[name], None
            first[name].lerp_(gradient, 1 - BETAS[0])
            second[name].lerp_(gradient.square(), 1 - BETAS[1])
            size = (second[name] / (1 - BETAS[1] ** (step + 1))).sqrt_().clamp_min_(1e-30)
            moved = masks[name] - RATE * (1 - step / steps) / (1 - BETAS[0] ** (step + 1)) * first[name] / size
            runs = moved.movedim(roles[name].input, -1)
            masks[name] = projected(runs.unflatten(-1, (-1, of)), stay).flatten(-2).movedim(-1, roles[name].input)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(dense[name] * masks[name])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--structure", default="2:4")
    parser.add_argument("--tokens", nargs="+", default=["200k", "800k"])
    asked = parser.parse_args()
    stay, of = (int(part) for part in asked.structure.split(":"))
    print(f"| run | ADMM | {' | '.join(asked.tokens)} |")
    print("|---|---|" + "---|" * len(asked.tokens))
    for path in asked.runs:
        run = Run(path)
        test, task = run.batches("test"), run.task
        references = References.of_many(run.model, test, task)
        few, ignore = run.batches("train").first(WINDOWS), run.recipe.prunable.ignore
        plan, admm = prune_layerwise(run.model, few, method="admm", structure=asked.structure, ignore=ignore, task=task)[:2]
        models = [admm, *(relaxed(run, plan.keep, stay, of, parse_count(tokens)) for tokens in asked.tokens)]
        first, *others = (evaluate(model, test, task, references).figures()["kl"] for model in models)
        print(f"| {path} | {first:.5f} | {' | '.join(f'{kl:.5f} ({kl / first:.2f})' for kl in others)} |", flush=True)


if __name__ == "__main__":
    main()
