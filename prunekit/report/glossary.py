"""What words mean that are prunekit's own, or that it uses in a narrower sense: one line each."""

from __future__ import annotations

GLOSSARY = {
    "sparsity": "the share of parameters removed, of the prunable ones where nothing else is said",
    "agreement": "the share of samples that get the same answer from the pruned and from the dense model",
    "divergence": "how far a pruned model's outputs are from the dense model's; for classes their KL divergence in nats",
    "kernel": "what the gradients of training samples moved, step by step: the kernel share of a contribution",
    "regularisation": "what weight decay moved, and whatever else moved weights without data: the other share",
    "certificate": "how far the sums over training steps miss the model that they rebuild, so how far to trust them",
    "kept weights' kernel machine": "the kept weights' contributions during training, added up without running the pruned model",
    "blame": "a removed weight's part of the divergence; the blame of all that was removed adds up to it",
    "residual": "what such a sum leaves unexplained",
    "refine": "to repair a mask: learn another of the same size from training samples, and keep it where scoring samples agree",
    "squeeze": "to take out neurons, channels and heads that read nothing or that nobody reads",
    "scoring samples": "a split of its own, on which criteria score weights and refined masks are accepted",
    "allocation": "how a criterion's importances share the sparsity out over layers",
}
"""Word -> its meaning, for pages; docs/explain.md lists the same."""
