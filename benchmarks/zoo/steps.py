"""The steps that every model of the zoo is walked through, by the command line, and what is checked after each."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.zoo import reference, table
from benchmarks.zoo.cells import FAULT, REFUSED, WORKS, Cell, Wrong, command, judged
from benchmarks.zoo.entry import STEPS, Entry
from prunekit import Plan, Trajectory, load, masked, prune
from prunekit.batch import answers, call
from prunekit.criteria import Scores
from prunekit.verbs.run_folder import Run

SHARES = {"unstructured": 0.5, "2:4": None, "channels": 0.3, "heads": 0.2, "layers": 0.3}
CRITERION = "magnitude"  # prunes, so that what a score lacks does not hide what pruning does
CLOSE = 1e-5
SIMILAR = 1e-3  # of scores, computed in single precision in another order
BUDGET = 3  # seconds of refining
FEW = ("--samples", 2, "--nodes", 1)
PATIENCE = 12  # times that budget, for what cannot be stopped in the middle


class Walk:
    """One model on its way through the steps.

    Args:
        name: of the model.
        folder: its run folders lie here; a walk that was stopped can go on in it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.entry = name, folder, table.MODELS[name]
        self.imported, self.recorded = folder / "imported", folder / "recorded"
        self.stopped = Cell(FAULT, "neither import nor record left a run")

    def cells(self, steps: Sequence[str] = STEPS) -> Iterator[tuple[str, Cell]]:
        """Each step's cell as it is made; a step whose run could not be made has the run's cell."""
        for step in steps:
            started = time.perf_counter()
            if step not in ("import", "record") and not (self.run / "recipe.yaml").exists():
                yield step, self.stopped
                continue
            cell = judged(getattr(self, f"_{step.replace(':', '_')}", self._scored(step)))
            if step in ("import", "record") and cell.verdict != WORKS:
                self.stopped = replace(cell, why=f"no run to go on with, since {step} said: {cell.why}", seconds=0.0)
            why = cell.why.replace(str(self.folder), "RUNS")  # where a walk ran is nobody's business
            yield step, replace(cell, why=why, seconds=round(time.perf_counter() - started, 2))

    @property
    def run(self) -> Path:
        """The recorded run, or the imported one where nothing could be recorded."""
        return self.recorded if (self.recorded / "recipe.yaml").exists() else self.imported

    # -- where it comes from -------------------------------------------------------------------------------------

    def _import(self) -> str:
        model = table.build(self.name)
        weights = self.folder / "weights.safetensors"
        safetensors.torch.save_model(model, str(weights))
        entry, named = self.entry, json.dumps({"name": self.name})
        options = ["--model", "benchmarks.zoo.table:build", "--model-args", named, "--weights", weights]
        options += ["--data", "benchmarks.zoo.table:data", "--data-args", named]
        options += [] if entry.task == "classification" else ["--task", json.dumps(entry.asked)]
        options += ["--loss", entry.loss] if entry.loss else []
        command("import", *options, "--out", self.imported, "--quiet")
        _same_state(Run(self.imported).model, model.state_dict(), "the imported model")
        return ""

    def _record(self) -> str:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(_recipe(self.name, self.entry))
        command("train", recipe, "--out", self.recorded, "--quiet")
        trajectory = Trajectory(self.recorded / "trajectory")
        if len(trajectory) != 4 or torch.equal(trajectory.state(0), trajectory.state(-1)):
            raise Wrong(f"{len(trajectory)} steps were recorded of 4, or nothing moved")
        return ""

    # -- scores --------------------------------------------------------------------------------------------------

    def _scored(self, criterion: str) -> Callable[[], str]:
        def score() -> str:
            unfit = ["--skip-unfit"] if criterion == "wanda" else []  # an embedding has no inputs to look at
            command("score", self.run, "-c", criterion, *unfit, "--quiet")
            run = Run(self.run)
            scores = Scores.load(run.score_path(criterion))
            if not any(bool(values.any()) for values in scores.importance.values()):
                raise Wrong("every score is 0")
            for values in scores.importance.values():
                if not bool(values.isfinite().all()):
                    raise Wrong("a score is not finite")
            if criterion in ("taylor", "fisher"):
                self._as_by_autograd(criterion, run, scores)
            return ""

        return score

    def _as_by_autograd(self, criterion: str, run: Run, scores: Scores) -> None:
        expected = getattr(reference, criterion)(run.model, self.entry)
        if expected is None:
            return
        names = list(scores.importance)
        found, wanted = (torch.cat([values[name].flatten() for name in names]) for values in (scores.importance, expected))
        off = reference.proportional(found, wanted)
        if not off <= SIMILAR:
            raise Wrong(f"{criterion} is {off:.2g} off what plain autograd gives, both of length 1")

    # -- what cuts -----------------------------------------------------------------------------------------------

    def _unstructured(self) -> str:
        return self._pruned("unstructured")

    def _2_4(self) -> str:
        return self._pruned("2:4")

    def _channels(self) -> str:
        return self._pruned("channels")

    def _heads(self) -> str:
        return self._pruned("heads")

    def _layers(self) -> str:
        return self._pruned("layers")

    def _refine(self) -> str:
        started = time.perf_counter()
        said = self._pruned("unstructured", "--refine", "--refine-budget", f"{BUDGET}s", name="refined")
        spent = time.perf_counter() - started
        facts = Plan.load(self.run / "pruned" / "refined" / "plan.safetensors").provenance["refine"]
        if facts["after"]["accept"] > facts["before"]["accept"]:
            raise Wrong("the refined plan is worse than the given one on the samples it was accepted on")
        if spent > BUDGET * PATIENCE:
            raise Wrong(f"--refine-budget {BUDGET}s took {spent:.0f} s")
        return said

    def _pruned(self, structure: str, *more: str, name: str | None = None) -> str:
        if not (self.run / "scores" / f"{CRITERION}.safetensors").exists():
            command("score", self.run, "-c", CRITERION, "--quiet")
        name = name or structure.replace(":", "-")
        share = SHARES[structure]
        asked = [] if share is None else ["-s", share]
        said = command("prune", self.run, "-c", CRITERION, *asked, "--structure", structure, "--name", name, *more)
        return self._checked(name, share, said)

    def _checked(self, name: str, share: float | None, said: str) -> str:
        """What a cut has to leave: the masked model's outputs, the saved model's numbers, and less of everything."""
        run, folder = Run(self.run), self.run / "pruned" / name
        plan, inputs = Plan.load(folder / "plan.safetensors"), run.example
        dense, back = run.model, load(folder, run.new_model).eval()
        cut = prune(dense, plan, inputs).eval()
        _same_state(back, safetensors.torch.load_file(folder / "model.safetensors"), "the loaded model")
        exact, found = _outputs(cut, inputs), _outputs(back, inputs)
        if not all(torch.equal(a, b) for a, b in zip(exact, found, strict=True)):
            raise Wrong("the loaded model does not compute exactly what the pruned one does")
        expected = _outputs(masked(dense, plan).eval(), inputs)
        off = max(_distance(a, b) for a, b in zip(expected, found, strict=True))
        if not off <= CLOSE:
            raise Wrong(f"the pruned model is {off:.2g} off the masked one")
        reached = plan.sparsity()["prunable"]
        if plan.smaller:
            self._smaller(run, back)
        elif sum(int((p != 0).sum()) for p in back.parameters()) >= sum(int((p != 0).sum()) for p in dense.parameters()):
            raise Wrong("no weight became 0")
        if not plan.smaller and share is not None and abs(reached - share) > 1e-3:
            raise Wrong(f"{reached:.1%} of the prunable weights went, {share:.0%} were asked for")
        if plan.smaller and share is not None and reached < share / 2 and (plan.missed or "?").partition(";")[0] not in said:
            raise Wrong(f"{reached:.1%} of the prunable weights went of {share:.0%} that were asked for, and nothing says so")
        return f"{reached:.0%}"

    def _smaller(self, run: Run, back: nn.Module) -> None:
        from prunekit.measure import sizes

        before, after = sizes(run.model, run.example), sizes(back, run.example)
        for what in ("parameters", "macs"):
            if not after[what] < before[what]:
                raise Wrong(f"{what} did not fall: {before[what]:,} before, {after[what]:,} after")

    # -- what is made of it --------------------------------------------------------------------------------------

    def _eval(self) -> str:
        name, run = self._made("channels", "layers", "unstructured")[0], Run(self.run)
        folder = self.run / "pruned" / name
        command("eval", folder, "--quiet")
        found = json.loads((folder / "eval.json").read_text())
        _finite(found, f"eval.json of {name}")
        for which, model in (("dense", run.model), ("pruned", load(folder, run.new_model).eval())):
            parameters = sum(p.numel() for p in model.parameters())
            if found[which]["parameters"] != parameters:
                raise Wrong(f"eval says {found[which]['parameters']} parameters, the {which} model has {parameters}")
            expected = reference.measure(model, self.entry)
            if expected is not None and not abs(found[which][expected[0]] - expected[1]) <= SIMILAR * max(1.0, expected[1]):
                raise Wrong(f"eval says {expected[0]} {found[which][expected[0]]} of the {which} model, it is {expected[1]}")
        return ""

    def _load(self) -> str:
        run = Run(self.run)
        names = self._made("unstructured", "2-4", "channels", "heads", "layers", "refined")
        for name in names:
            folder = run.path / "pruned" / name
            back = load(folder, run.new_model).eval()
            _same_state(back, safetensors.torch.load_file(folder / "model.safetensors"), name)
            exact = _outputs(prune(run.model, Plan.load(folder / "plan.safetensors"), run.example).eval(), run.example)
            if not all(torch.equal(a, b) for a, b in zip(exact, _outputs(back, run.example), strict=True)):
                raise Wrong(f"{name} as loaded does not compute exactly what was saved")
        return f"{len(names)} models"

    def _explain(self) -> str:
        run, name = Run(self.run), self._made("unstructured", "channels")[0]
        if len(run.trajectory):  # what came from where is about a path
            layer = next(name for name in run.evidence.prunable if "." in name).rpartition(".")[0]
            said = command("explain", self.run, "layer", layer, "--pruned", name, "--quiet", "--json", *FEW)
            _finite(json.loads(said), f"explain layer {layer}")
        said = command("explain", self.run / "pruned" / name, "--quiet", "--json", *FEW)
        _finite(json.loads(said), f"explain pruned/{name}")
        return ""

    def _made(self, *names: str) -> list[str]:
        """Those of these pruned models that there are.

        Raises:
            Wrong: none of them.
        """
        found = [name for name in names if (self.run / "pruned" / name / "prunekit.json").exists()]
        if not found:
            raise Wrong("there is no pruned model to go on with")
        return found


def walk(name: str, folder: Path, steps: Sequence[str] = STEPS) -> dict[str, Cell]:
    """Every step's cell; senseless ones are asked for too, since they have to be refused well or to work."""
    folder.mkdir(parents=True, exist_ok=True)
    return dict(Walk(name, folder).cells(steps))


def cleared(folder: Path) -> None:
    """Removes what a walk left."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def counted(entry: Entry, step: str, cell: Cell) -> bool:
    """Whether a cell counts among those that make sense: all but what this entry calls senseless, if it was refused."""
    return step not in entry.senseless or cell.verdict != REFUSED


def _recipe(name: str, entry: Entry) -> str:
    """A short training of 4 steps, and as little of everything as can be."""
    content: dict[str, Any] = {
        "seed": 0,
        "threads": 1,
        "model": {"factory": "benchmarks.zoo.table:build", "args": {"name": name}},
        "data": {"factory": "benchmarks.zoo.table:data", "args": {"name": name}},
        "train": {
            "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
            "schedule": {"name": "constant"},
            "epochs": 2,
            "batch_size": 8,
        },
        "score": {"samples": 6},
        "eval": {"samples": 2, "nodes": 1, "latency_batches": [1]},
    }
    if entry.task != "classification":
        content["task"] = entry.asked
    if entry.loss:
        content["loss"] = entry.loss
    return json.dumps(content)  # JSON is YAML


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return [answer.float() for answer in answers(call(model, inputs))]


def _distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference, in units of the largest expected output where that is above 1."""
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1.0)) if expected.numel() else 0.0


def _same_state(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or not torch.equal(own[name], tensor):
            raise Wrong(f"{what}: {name} is not what was saved")


def _finite(nest: Any, what: str) -> None:
    """Raises Wrong when a number somewhere in ``nest`` is NaN or infinite."""
    if isinstance(nest, dict):
        for key, value in nest.items():
            _finite(value, f"{what}, {key}")
    elif isinstance(nest, list):
        for value in nest:
            _finite(value, what)
    elif isinstance(nest, float) and not abs(nest) < float("inf"):
        raise Wrong(f"{what} is {nest}")
