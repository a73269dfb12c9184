"""Perplexity of public language models, dense and pruned, by the papers' protocol, beside what the papers published.

    python benchmarks/public_models.py DIR --text wiki.test.raw
    python benchmarks/public_models.py DIR --text wiki.test.raw --calibration c4-train.00000-of-01024.json.gz \
        --sparsity 0.5 --method magnitude wanda sparsegpt admm --device cuda
    python benchmarks/public_models.py DIR --text wiki.test.raw --calibration c4-train.00000-of-01024.json.gz \
        --structure 2:4 --method learn --windows 2048 --tokens 2000000 --device cuda

DIR is a folder of a causal language model on this machine: config.json, safetensors, a tokenizer. Nothing is fetched, and no code
in the folder is run. The weights stay in the checkpoint's type and, with accelerate, go to the device one by one. How texts
become windows, and what perplexity is: ``benchmarks/paper_protocol.py``.

Methods: those of ``prunekit.prune_layerwise`` (magnitude, wanda, sparsegpt, admm; the blocks' layers, each the same share);
``learn``, masks that ``prunekit.refine`` learns from the calibration windows, no weight changed; or any criterion of
``prunekit.score``, such as ``fisher``. All leave whole what lies outside the blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper_protocol import Published, calibration_windows, following_windows, joined_text, published, window_length
from prunekit import Plan, Trajectory, make_plan, prune, refine, score
from prunekit.data import Samples
from prunekit.errors import ArtifactError, PrunekitError, UsageError, theirs
from prunekit.huggingface import load_model, quietly
from prunekit.huggingface.classes import read_config, transformers
from prunekit.huggingface.folder import OTHERS, Folder
from prunekit.measure.generation import places
from prunekit.repair.streamed import Streaming
from prunekit.task import get_task
from prunekit.task.evaluation import Evaluation, References, evaluate
from prunekit.task.places import LanguageModel
from prunekit.task.protocol import paired, protocol

LAYERWISE = ("magnitude", "wanda", "sparsegpt", "admm")
LEARN = "learn"
WINDOWS = 128
"""Of calibration text, as in the papers."""


def read_model(folder: Path, device: str) -> nn.Module:
    """The model on the device.

    Raises:
        ArtifactError: the folder has pickles alone, or is no whole model.
    """
    there = [name for name in OTHERS if (folder / name).exists()]
    if there and not any(folder.glob("*.safetensors")):
        raise ArtifactError(
            f"{folder}: has {there[0]}, which is unpickled when it is read, and no safetensors; where you trust it, convert it "
            f"once: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\""
        )
    straight = torch.device(device).type != "cpu" and importlib.util.find_spec("accelerate") is not None
    return load_model(folder, "AutoModelForCausalLM", device if straight else None).to(device).eval()


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, by transformers."""
    with theirs(f"{folder}: reading its tokenizer"), quietly():
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def samples_of(windows: Tensor, task: LanguageModel) -> Samples:
    """Windows as samples of the task, one a batch: as the papers read them."""
    return Samples.of([{"input_ids": windows}], task.batch).bounded(1)


def outside_blocks(model: nn.Module) -> list[str]:
    """Names of the parameters that are in none of the model's blocks, the longest list of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UsageError(f"{type(model).__name__} has no list of blocks")
    blocks = max(lists, key=lambda each: len(each[1]))[0]
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{blocks}.")]


def pruned_by(
    method: str, model: nn.Module, samples: Samples, *, sparsity: float | None, structure: str, tokens: int, batch: int
) -> tuple[Plan, nn.Module]:
    """The plan and the pruned model."""
    if method in LAYERWISE:
        from prunekit import prune_layerwise

        return prune_layerwise(model, samples, method=method, sparsity=sparsity, structure=structure, task="causal_lm")
    criterion = "magnitude" if method == LEARN else method
    ignore = outside_blocks(model)
    found = score(Trajectory.of(model), model, samples, criterion=criterion, ignore=ignore, task="causal_lm")
    plan = make_plan(found, model, structure=structure, sparsity=sparsity)
    if method == LEARN:
        plan = refine(plan, model, samples, stream=Streaming(tokens, batch), task="causal_lm")
    return plan, prune(model, plan, samples.rows(0, 1)[0])


def measured(
    folder: Path,
    text: str,
    *,
    length: int | None = None,
    calibration: Path | None = None,
    windows: int = WINDOWS,
    methods: tuple[str, ...] = (),
    sparsity: float | None = None,
    structure: str = "unstructured",
    tokens: int = 500_000,
    batch: int = 4,
    device: str = "cpu",
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every figure: ``model``, ``protocol``, ``dense``, and by method ``perplexity``, ``kl``, ``paired``, ``seconds``.

    Raises:
        PrunekitError: see the functions above.
    """
    task = get_task("causal_lm")
    assert isinstance(task, LanguageModel)
    config, tokenizer = read_config(Folder(folder)), read_tokenizer(folder)
    model = read_model(folder, device)
    known = published(config)
    length = window_length(length, places(model), known)
    samples = samples_of(following_windows(tokenizer, text, length), task)
    dense = evaluate(model, samples, task)
    found: dict[str, Any] = {
        "model": known.name if known else type(model).__name__,
        "device": device,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "protocol": protocol(task, "test", samples, dense, length),
        "dense": _told("dense", "", dense, known, length),
        "methods": {},
    }
    tell(_line("dense", found["dense"]))
    amount = structure if structure != "unstructured" else f"{sparsity:g}" if sparsity is not None else ""
    if methods and calibration is None:
        raise UsageError("--method needs --calibration, a text to prune by that is not the test text")
    for method in methods:
        assert calibration is not None
        given = samples_of(calibration_windows(tokenizer, calibration, length, windows), task)
        begun = time.perf_counter()
        plan, smaller = pruned_by(method, model, given, sparsity=sparsity, structure=structure, tokens=tokens, batch=batch)
        seconds = time.perf_counter() - begun
        after = evaluate(smaller, samples, task, References(model, samples, task))
        found["methods"][method] = {
            **_told(method, amount, after, known, length),
            "kl": after.figures()["kl"],
            "agreement": after.figures()["agreement"],
            "removed": plan.sparsity()["prunable"],
            "paired": paired(after, dense),
            "seconds": seconds,
        }
        del smaller
        tell(_line(f"{method}, {amount}", found["methods"][method]))
    if known is not None and length == known.length:
        for (name, at), value in known.figures.items():
            if at and name not in methods and (at == amount or not methods):
                tell(f"{name}, {at}: published {value:g}, not measured here")
    return found


def _told(method: str, amount: str, found: Evaluation, known: Published | None, length: int) -> dict[str, Any]:
    told: dict[str, Any] = {"perplexity": found.figures()["perplexity"]}
    if known is not None and length == known.length and (method, amount) in known.figures:
        told["published"] = known.figures[method, amount]
    return told


def _line(name: str, told: dict[str, Any]) -> str:
    beside = f" (published {told['published']:g})" if "published" in told else ""
    more = ""
    if "kl" in told:
        nats = told["paired"]["differences"]["nats_per_token"]
        error = f" ± {nats['standard_error']:.4f}" if "standard_error" in nats else ""
        more = f"; {nats['difference']:+.4f}{error} nats a token, KL {told['kl']:.4f}, {told['seconds']:,.0f} s"
    return f"{name}: perplexity {told['perplexity']:.2f}{beside}{more}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--text", type=Path, required=True, help="the test set: wiki.test.raw, .jsonl or .parquet")
    parser.add_argument("--joined", action="store_true", help="the text's rows are joined already")
    parser.add_argument("--length", type=int, help="tokens of a window; the published one, or 2,048, or the model's positions")
    parser.add_argument("--calibration", type=Path, help="text to prune by, such as a file of C4")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of calibration text")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float)
    amount.add_argument("--structure", default="unstructured", help="such as 2:4")
    parser.add_argument("--method", nargs="+", default=[], help="magnitude, wanda, sparsegpt, admm, learn, or a criterion")
    parser.add_argument("--tokens", type=int, default=500_000, help="that learn learns from")
    parser.add_argument("--batch", type=int, default=4, help="windows a step of learn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="file for every figure, as JSON")
    given = parser.parse_args()
    methods = tuple(given.method)
    try:
        if (given.sparsity is not None or given.structure != "unstructured") and not methods:
            methods = ("sparsegpt",)
        if methods and given.sparsity is None and given.structure == "unstructured":
            raise UsageError("--method needs --sparsity, or --structure such as 2:4")
        text = joined_text(given.text, given.joined)
        found = measured(
            given.folder, text, length=given.length, calibration=given.calibration, windows=given.windows, methods=methods,
            sparsity=given.sparsity, structure=given.structure, tokens=given.tokens, batch=given.batch, device=given.device,
        )  # fmt: skip
    except PrunekitError as error:
        print(f"public_models: {error}", file=sys.stderr)
        return 2
    p = found["protocol"]
    print(
        f"{found['model']}, {found['dtype']} on {found['device']}: {p['windows']:,} windows of {p['length']:,} tokens without "
        f"overlap, each read alone; exp of the mean over the {p['tokens']:,} tokens that have one before them in their window"
    )
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
