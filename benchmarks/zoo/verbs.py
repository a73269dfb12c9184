"""Every task through every verb: the examples of docs/tasks.md, walked by the command line.

python -m benchmarks.zoo.verbs                  # writes its table into docs/tasks.md
python -m benchmarks.zoo.verbs --only 'pixels'  # prints it
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there

from benchmarks.zoo.cells import FAULT, REFUSED, WORKS, Cell, Wrong, command, judged
from prunekit.progress import Bar, progress_bars

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
FILES: dict[str, str] = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.S))
TASKS = {
    "classes": "classification", "yesno": "binary", "labels": "multi_label", "numbers_": "regression", "pixels": "segmentation",
    "tagger": "token_classification", "writer": "causal_lm", "blanks": "masked_lm", "answer": "seq2seq", "vae": "heads",
    "outputs": "unlabelled",
}  # fmt: skip
"""Example -> its task."""
BEGIN, END = "<!-- every task, every verb -->", "<!-- end -->"
FEW = ("--samples", 4, "--nodes", 1)
TRY = ("--refine-budget", "3s")


class Walk:
    """One example's way through the verbs, in the working folder."""

    def __init__(self, name: str) -> None:
        self.name, self.trained = name, f"{name}.yaml" in FILES
        self.run = Path("imported" if not self.trained else "run")

    def cells(self) -> dict[str, Cell]:
        return {what: judged(step) for what, step in self.steps().items() if self.trained or what not in NEEDS_TRAINING}

    def steps(self) -> dict[str, Any]:
        return {
            "train": lambda: command("train", f"{self.name}.yaml", "--out", self.run, "-q") and "",
            "import": self._import,
            "score": lambda: self._quiet("score", "-c", "magnitude", "-c", self._taylor),
            "influence": lambda: self._quiet("score", "-c", "influence"),
            "compare": self._compare,
            "sensitivity": lambda: self._quiet("sensitivity", "--sparsity", 0.5),
            "auto": lambda: self._pruned("auto", "-c", "auto", "-s", 0.5, *TRY),
            "drop": self._drop,
            "size": lambda: self._pruned("size", "-c", "magnitude", "--structure", "channels", "--max-bytes", self._bytes()),
            "refine": lambda: self._pruned("refined", "-c", "magnitude", "-s", 0.6, "--refine"),
            "compensate": lambda: self._pruned("compensated", "-c", "magnitude", "-s", 0.5, "--compensate"),
            "finetune": lambda: self._pruned(
                "tuned", "-c", "magnitude", "-s", 0.5, "--schedule", "iterative", "--rounds", 2, "--finetune", 1,
                "--refine", *TRY, "--refine-again", 1,
            ),
            "gradual": lambda: self._pruned(
                "gradual", "-c", "magnitude", "-s", 0.5, "--schedule", "gradual", "--rounds", 2, "--finetune", 2, "--distill", 0.5
            ),
            "rewind": lambda: self._pruned("rewound", "-c", "magnitude", "-s", 0.5, "--rewind", 2),
            "eval": self._eval,
            "explain": self._explain,
            "report": lambda: self._quiet("report"),
            "study": self._study,
        }  # fmt: skip

    @property
    def _taylor(self) -> str:
        """Of the loss, where the task has one."""
        return "taylor" if self.trained else "taylor(target=outputs)"

    def _quiet(self, verb: str, *options: Any) -> str:
        command(verb, self.run, *options, "-q")
        return ""

    def _import(self) -> str:
        import safetensors.torch

        module = __import__("writer" if self.name == "blanks" else self.name)
        data = f"{module.__name__}:{'masked' if self.name == 'blanks' else 'data'}"
        task = "vae:task" if self.name == "vae" else TASKS[self.name]
        early, late = module.build(), module.build()  # two checkpoints: a path of one long step
        safetensors.torch.save_model(early, "early.safetensors")
        safetensors.torch.save_model(late, "late.safetensors")
        command("import", "--model", f"{module.__name__}:build", "--weights", "early.safetensors", "--weights",
                "late.safetensors", "--data", data, "--task", task, "--out", "imported", "-q")  # fmt: skip
        command("score", "imported", "-c", "magnitude", "-q")
        command("prune", "imported", "-c", "magnitude", "-s", 0.5, "--name", "half", "-q")
        command("eval", "imported/pruned/half", "-q")
        return ""

    def _compare(self) -> str:
        self._quiet("compare", "--structure", "unstructured", "--structure", "channels", "--allocation", "global",
                    "--sparsity", 0.3, "--refine")  # fmt: skip
        found = json.loads((self.run / "compare.json").read_text())
        first = found["measures"][0]
        if not all(first["name"] in cell for cell in found["cells"]):
            raise Wrong(f"compare tells no {first['name']}")
        return ""

    def _pruned(self, name: str, *options: Any) -> str:
        self._quiet("prune", *options, "--name", name)
        return ""

    def _drop(self) -> str:
        """A budget of half of what pruning 30 % at once costs of the first measure: validation data lose no more."""
        compared = json.loads((self.run / "compare.json").read_text())
        first, name = compared["measures"][0], compared["measures"][0]["name"]
        lost = max(abs(cell[name] - compared["dense"][name]) for cell in compared["cells"])
        allowed = max(lost / 2, 0.02) * (100 if first["unit"] == "%" else 1)
        told = json.loads(command("prune", self.run, "-c", "magnitude", "--max-drop", allowed, "--name", "drop", "--json", "-q"))
        if not told["reached"] <= allowed:
            raise Wrong(f"loses {told['reached']} of {allowed} allowed")
        return ""

    def _bytes(self) -> int:
        """Nine tenths of what the dense model takes."""
        from prunekit.verbs.run_folder import Run

        state = Run(self.run).model.state_dict()
        return round(0.9 * sum(t.numel() * t.element_size() for t in state.values())) + 2000

    def _eval(self) -> str:
        for name in sorted(path.name for path in (self.run / "pruned").iterdir()):
            command("eval", self.run / "pruned" / name, "-q")
            found = json.loads((self.run / "pruned" / name / "eval.json").read_text())
            first = found["measures"][0]
            if first["name"] not in found["pruned"] or first["name"] not in found["dense"]:
                raise Wrong(f"eval tells no {first['name']}")
        return ""

    def _explain(self) -> str:
        part = next(iter(self._prunable()))
        layer = part.rpartition(".")[0]
        self._quiet("explain", "layer", layer, *FEW)
        self._quiet("explain", "weight", part, "0,0" + ",0" * (self._dims(part) - 2), *FEW)
        self._quiet("explain", "sample", 0, *FEW)
        self._quiet("explain", "pruned", "refined", *FEW)
        self._quiet("explain", "diff", "refined", *FEW)
        command("explain", self.run / "pruned" / "refined", "-q")
        return ""

    def _prunable(self) -> dict[str, Any]:
        from prunekit.plan import Plan

        return dict(Plan.load(self.run / "pruned" / "refined" / "plan.safetensors").masks())

    def _dims(self, name: str) -> int:
        return int(self._prunable()[name].dim())

    def _study(self) -> str:
        study = {
            "cases": {"one": f"{self.name}.yaml"}, "seeds": [0, 1], "samples": 12, "criteria": ["magnitude", "random"],
            "structures": {"unstructured": [0.5]}, "allocations": {"unstructured": ["global"]}, "leading": 1, "always": [],
            "compensate": True, "tune": {"epochs": 1, "sparsities": {"unstructured": [0.5]}},
            "refine": {"of": {"unstructured": ["magnitude"]}, "ways": {"unstructured": ["refined"]}},
        }  # fmt: skip
        Path("study.yaml").write_text(json.dumps(study))
        command("compare", "study.yaml", "--out", "study", "-q")
        return ""


NEEDS_TRAINING = ("train", "rewind", "study")
"""What an example without a recipe has nothing for."""


def walked(name: str) -> dict[str, Cell]:
    """Every cell of an example."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
        os.chdir(folder)
        for file, text in FILES.items():
            Path(file).write_text(text)
        sys.path.append(folder)
        return Walk(name).cells()


def table(results: dict[str, dict[str, Cell]]) -> str:
    """Markdown: tasks × verbs, and what was refused and why."""
    marks = {WORKS: "✓", REFUSED: "r", FAULT: "✗"}
    verbs = list(Walk("classes").steps())
    lines = ["| task | " + " | ".join(verbs) + " |", "|---" * (len(verbs) + 1) + "|"]
    for name, row in results.items():
        lines.append(f"| `{TASKS[name]}` | " + " | ".join(marks[row[v].verdict] if v in row else "" for v in verbs) + " |")
    notes = [
        f"- {verb}, {TASKS[name]}: {cell.why}" + (f" ({cell.where})" if cell.verdict == FAULT and cell.where else "")
        for name, row in results.items()
        for verb, cell in row.items()
        if cell.verdict != WORKS
    ]
    return "\n".join([*lines, "", *notes])


def write(text: str) -> None:
    """Puts the table between its marks in docs/tasks.md."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.verbs", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="examples of docs/tasks.md whose name matches")
    given = parser.parse_args()
    names = [name for name in TASKS if fnmatch.fnmatch(name, given.only)]
    results: dict[str, dict[str, Cell]] = {}
    context = multiprocessing.get_context("spawn")
    with progress_bars(True), Bar("tasks", len(names)) as bar, ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        for name, cells in zip(names, pool.map(walked, names), strict=True):
            results[name] = cells
            bar.advance()
    print(table(results))
    if given.only == "*":
        write(table(results))
    return int(any(cell.verdict == FAULT for row in results.values() for cell in row.values()))


if __name__ == "__main__":
    sys.exit(main())
