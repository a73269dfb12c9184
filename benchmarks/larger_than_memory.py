"""A language model is pruned whose file is four times the memory that pruning takes, or scored, block by block from disk.

    python benchmarks/larger_than_memory.py                      # a Llama of 1.2 GB in single precision, SparseGPT
    python benchmarks/larger_than_memory.py --method wanda --width 512 --layers 24
    python benchmarks/larger_than_memory.py --score gradient wanda   # prunekit score RUN --device-map instead

Each row is a process of its own: ``prunekit compress DIR --layerwise METHOD --offload``. Memory is its peak resident set as the
system counts it (``ru_maxrss``: pages of files that are mapped count too), less that of the very same command on a Llama of two
narrow blocks, which is Python, torch, transformers and what they keep. Nothing limits the process: it is a measurement. Then
another process loads dense and pruned folder whole and measures the same windows again: perplexity by streaming and in memory
must agree. Weights are random; their perplexity says nothing but that both ways compute the same.

Of ``--score`` the weights are read from the run's recording, whose pages the system maps and takes back as it likes. Memory is
therefore the most that was a process's own (``RssAnon``, looked at every 20 ms), less the tiny model's; the scores are in it.
Another process scores the same run as a whole, and both must agree to 1e-4 of each layer's norm.
Needs the extra ``hf``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = "windows_of_larger_than_memory"
TINY = {"vocabulary": 256, "width": 64, "layers": 2, "heads": 2, "hidden": 64}


def data_module(vocabulary: int, windows: int, length: int) -> str:
    """The source of a data factory: texts in which a token follows from the one before it, with some noise."""
    return f"""import torch

def texts():
    found = {{}}
    for seed, (name, size) in enumerate({{"train": {windows}, "validation": 2, "test": 8, "scoring": 2}}.items()):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (size, {length}), generator=generator)
        ids = (torch.randint({vocabulary}, (size, 1), generator=generator) + steps.cumsum(1)) % {vocabulary}
        found[name] = {{"input_ids": ids, "labels": ids}}
    return found
"""


def make(folder: Path, sizes: dict[str, int], length: int) -> None:
    """Runs in a process of its own: the model whole in memory, and its files."""
    import torch

    from prunekit.models import llama

    torch.manual_seed(0)
    model: Any = llama(**sizes, kv_heads=sizes["heads"], length=length, tied=False)
    model.save_pretrained(folder, max_shard_size=2**29)


def check(folders: list[Path], place: Path) -> list[float]:
    """Runs in a process of its own: perplexity of whole models in memory on the windows."""
    import torch

    from prunekit.huggingface import load_model
    from prunekit.recipe import Recipe
    from prunekit.task.evaluation import evaluate
    from prunekit.verbs.run_folder import load_splits

    sys.path.insert(0, str(place))
    recipe = Recipe.of(
        {"model": {"pretrained": str(folders[0])}, "data": {"factory": f"{DATA}:texts"}, "task": "causal_lm"}, "benchmark"
    )
    samples = load_splits(recipe)["test"].samples(2)
    with torch.no_grad():
        return [evaluate(load_model(folder), samples, recipe.load_task()).figures()["perplexity"] for folder in folders]


def child(place: Path, *words: str) -> tuple[str, int, float]:
    """What a process printed, its peak resident set in bytes, and its seconds."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *words], cwd=place, stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} failed with {process.returncode}")
        out.seek(0)
        return out.read(), used.ru_maxrss * (1024 if sys.platform == "linux" else 1), time.perf_counter() - begun


def scored(place: Path, run: str, criterion: str, *options: str) -> tuple[int, float]:
    """The most bytes of its own that ``prunekit score`` had, and its seconds."""
    words = ["-m", "prunekit", "score", run, "-c", criterion, "--skip-unfit", "--overwrite", "--quiet", *options]
    begun, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *words], cwd=place, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
        most = max([most, *(1024 * int(line.split()[1]) for line in lines)])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed with {process.returncode}")
    return most, time.perf_counter() - begun


def differ(whole: Path, parts: Path) -> float:
    """By how much scores differ at most, as a share of their layer's norm."""
    from prunekit import Scores

    one, other = Scores.load(whole).importance, Scores.load(parts).importance
    return max(float((other[name] - found).norm() / found.norm().clamp_min(1e-30)) for name, found in one.items())


def scoring(place: Path, criteria: list[str], memory: str, file: int) -> None:
    """The table of ``--score``."""
    for name in ("tiny", "large"):
        child(
            place, "-m", "prunekit", "import", "--hf", name, "--data", f"{DATA}_{name}:texts", "--out", f"run-{name}", "--quiet"
        )
    print(
        "| criterion | weights, MB | own, MB | the tiny model's, MB | beyond it, MB | scores, MB | s | as a whole: own, MB | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for criterion in criteria:
        path = place / "run-large" / "scores" / f"{criterion}.safetensors"
        spread = ("--device-map", '{"": "disk"}', "--memory", memory)
        base, _ = scored(place, "run-tiny", criterion, *spread)
        peak, seconds = scored(place, "run-large", criterion, *spread)
        parts = path.rename(place / f"{criterion}.safetensors")
        all_of_it, longer = scored(place, "run-large", criterion)
        size = parts.stat().st_size
        print(
            f"| {criterion} | {file / 1e6:,.0f} | {peak / 1e6:,.0f} | {base / 1e6:,.0f} | {(peak - base) / 1e6:,.0f} | "
            f"{size / 1e6:,.0f} | {seconds:,.0f} | {all_of_it / 1e6:,.0f} | {longer:,.0f} |",
            flush=True,
        )
        if (found := differ(path, parts)) > 1e-4:
            raise SystemExit(f"{criterion}: scores differ by {found:g} of a layer's norm")


def compressed(place: Path, name: str, method: str, activations: str) -> tuple[dict[str, Any], int, float]:
    printed, peak, seconds = child(
        place, "-m", "prunekit", "compress", name, "--data", f"{DATA}_{name}:texts", "--layerwise", method, "--sparsity", "0.5",
        "--offload", "--activations", activations, "--out", f"{name}-{method}", "--json",
    )  # fmt: skip
    return json.loads(printed), peak, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["sparsegpt"])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--activations", default="4MiB", help="of the hidden states in memory; the others lie on disk")
    parser.add_argument("--score", nargs="+", metavar="CRITERION", help="score by these instead of pruning")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    large = {
        "vocabulary": asked.vocabulary, "width": asked.width, "layers": asked.layers, "heads": asked.width // 64,
        "hidden": asked.hidden,
    }  # fmt: skip
    if asked.inside is not None:  # one of the processes
        what, *given = json.loads(asked.inside)
        if what == "make":
            make(Path(given[0]), given[1], asked.length)
        else:
            print(json.dumps(check([Path(folder) for folder in given], Path())))
        return
    here, common = str(Path(__file__).resolve()), ["--length", str(asked.length)]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for name, sizes in (("tiny", TINY), ("large", large)):
            child(place, here, *common, "--inside", json.dumps(["make", name, sizes]))
            source = data_module(sizes["vocabulary"], asked.windows, asked.length)
            (place / f"{DATA}_{name}.py").write_text(source)
        (place / f"{DATA}.py").write_text(data_module(asked.vocabulary, asked.windows, asked.length))
        file = sum(path.stat().st_size for path in (place / "large").glob("*.safetensors"))
        print(f"a Llama of {file / 1e6:,.0f} MB in {asked.layers} blocks, {asked.windows} windows of {asked.length} tokens")
        if asked.score:
            scoring(place, asked.score, asked.activations, file)
            return
        print("| method | file, MB | peak, MB | the tiny model's, MB | beyond it, MB | file / beyond | s | perplexities |")
        print("|---|---|---|---|---|---|---|---|")
        for method in asked.method:
            _, base, _ = compressed(place, "tiny", method, asked.activations)
            found, peak, seconds = compressed(place, "large", method, asked.activations)
            whole = json.loads(child(place, here, "--inside", json.dumps(["check", "large", f"large-{method}"]))[0])
            streamed = [found[name]["perplexity"] for name in ("dense", "pruned")]
            agree = all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(streamed, whole, strict=True))
            told = ", ".join(f"{value:,.2f}" for value in streamed)
            print(
                f"| {method} | {file / 1e6:,.0f} | {peak / 1e6:,.0f} | {base / 1e6:,.0f} | {(peak - base) / 1e6:,.0f} | "
                f"{file / (peak - base):.1f} | {seconds:,.0f} | {told} (in memory {'the same' if agree else whole}) |",
                flush=True,
            )
            if not agree:
                raise SystemExit("streaming and memory disagree")


if __name__ == "__main__":
    main()
