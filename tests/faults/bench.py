"""A finished run, copied for every fault; verbs called on the copy in processes of their own, forked from a warm one."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from prunekit import checkpoint, durable
from tests.faults.small import RECIPE, prunekit, save_pretrained

OTHER = RECIPE.replace("lr: 0.02", "lr: 0.03")
STUDY = """
cases: {one: recipe.yaml}
seeds: [0]
criteria: [magnitude]
samples: 8
structures: {unstructured: [0.5]}
allocations: {unstructured: [global]}
leading: 0
tune: {epochs: 1, sparsities: {}}
"""
PLACES = {"RECIPE": "recipe.yaml", "OTHER": "other.yaml", "STUDY": "study.yaml", "TRAINED": "trained", "NEW": "new",
          "WEIGHTS": "weights.safetensors", "MODEL": "model"}  # fmt: skip
Hook = Callable[[str, Path], None]


class Done(NamedTuple):
    """How a call ended: its exit code, negative for the signal that ended it, and what it said."""

    code: int
    out: str
    err: str


class Bench:
    """Works in ``folder``: ``base`` holds the finished run and what verbs are given beside it.

    Args:
        pretrained: also a model in a folder of transformers, whose import takes seconds.
    """

    def __init__(self, folder: Path, pretrained: bool = False) -> None:
        self.folder, self.base = folder, folder / "base"
        self.base.mkdir()
        os.environ["PRUNEKIT_STATE"] = str(folder / "state")
        for name, text in (("recipe", RECIPE), ("other", OTHER), ("study", STUDY)):
            (self.base / f"{name}.yaml").write_text(text)
        for verb in (("run", "RECIPE", "--out", "RUN"), ("compare", "STUDY", "--out", "TRAINED")):
            if (done := self.call(self.base, verb)).code != 0:
                raise RuntimeError(done.err)
        for path in (self.base / "trained").iterdir():  # the study's run alone
            if path.name != "runs":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.base / "trained" / "runs" / "one-seed0" / "scores")
        model = checkpoint.read_tensors(self.base / "run" / "pruned" / "loose" / "model.safetensors")
        checkpoint.write_tensors(self.base / "weights.safetensors", model, {})
        if pretrained:
            save_pretrained(self.base / "model")
        for module in json.loads((self.folder / "modules").read_text()):  # what each child would import anew
            with contextlib.suppress(Exception):
                importlib.import_module(module)

    def copy(self, name: str) -> Path:
        """A fresh copy of ``base``."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.base, place)
        return place

    def call(
        self, place: Path, verb: Sequence[str], hook: Hook | None = None, *, after: float | None = None, limit: float = 60
    ) -> Done:
        """One verb on a copy.

        Args:
            verb: its arguments, where RUN stands for the run, and ``PLACES`` for what lies beside it.
            hook: called before its durable operations.
            after: seconds until it is killed; None for never.
            limit: seconds of processor after which it counts as hanging, or ten times as many by the clock, since machines are
                shared: exit code -SIGPROF or -SIGALRM.
        """
        child = os.fork()
        if child == 0:
            code, opened = 1, set[str]()
            try:
                sys.addaudithook(lambda event, facts: opened.add(str(facts[0])) if event == "open" else None)
                for number, name in ((1, "out"), (2, "err")):
                    with (self.folder / name).open("w") as file:
                        os.dup2(file.fileno(), number)
                durable.on_operation = hook or durable.on_operation
                for timer, end, most in (
                    (signal.ITIMER_PROF, signal.SIGPROF, limit),
                    (signal.ITIMER_REAL, signal.SIGALRM, 10 * limit),
                ):
                    signal.signal(end, signal.SIG_DFL)
                    signal.setitimer(timer, most)
                code = prunekit(*self.arguments(place, verb))
                sys.stdout.flush()
                (self.folder / "opened").write_text("\n".join(sorted(opened)))
                if not (self.folder / "modules").exists():
                    (self.folder / "modules").write_text(json.dumps(sorted(sys.modules)))
            finally:
                sys.stderr.flush()
                os._exit(code)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Done(code, *((self.folder / name).read_text(errors="replace") for name in ("out", "err")))

    def opened(self, place: Path) -> list[Path]:
        """Files of a copy that the last call has opened."""
        return [place / Path(name).relative_to(place) for name in (self.folder / "opened").read_text().splitlines()
                if name.startswith(f"{place}/") and "/.prunekit." not in name]  # fmt: skip

    def arguments(self, place: Path, verb: Sequence[str]) -> list[str]:
        """A verb's, for a copy."""
        found = [str(place / PLACES[word]) if word in PLACES else word for word in verb]
        return [str(place / "run") + word[3:] if word.startswith("RUN") else word for word in found]
