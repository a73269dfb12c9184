"""A run folder: where everything lies, and how to open it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit import checkpoint, durable, trust
from prunekit.batch import Inputs
from prunekit.criteria import Evidence, Scores, compose, expand, model_digest, parse, score_slug
from prunekit.data import Samples, Split, as_splits
from prunekit.errors import ArtifactError, PrunekitError, UsageError
from prunekit.imports import call
from prunekit.links import refuse_links_out
from prunekit.recipe import Recipe, check_device, read_yaml
from prunekit.remote import placed
from prunekit.reusing import as_noted, first_difference, recorded_inputs
from prunekit.search import Comparison
from prunekit.structure import kept_layers, prunable_parameters
from prunekit.task import Task
from prunekit.trajectory import Trajectory, load_into
from prunekit.verbs.checks import settled
from prunekit.verbs.configured import check_config

EXPLAINED, TEXTS = 128, 8
"""Test samples that eval rebuilds and explain looks at, where the recipe does not say how many; of language models texts, each of
which has as many answers as tokens."""
RECORDED = "recorded"
"""Key in the provenance of a trajectory that came from a training loop of the user's own: the hash of what it recorded."""
OF_THE_MACHINE = ("device", "threads")
"""Keys of a recipe that may be others later than they were in training."""


class Run:
    """An opened run folder.

    Args:
        path: the folder that ``train`` or ``import`` made.
        device: overrides the recipe's.
        classes: look at these classes alone: ``batches`` gives their samples only, scores are made from those (and lie in a
            folder of their own), and of the target ``outputs`` theirs count.
        code: whether model or data are looked at, whose code the recipe names; see ``prunekit.trust``.

    Raises:
        UsageError: it is no run folder, or its recipe names code that is not known to be this user's.
        ArtifactError: a link leads out of it.
    """

    def __init__(self, path: str | Path, device: str | None = None, classes: Sequence[int] = (), *, code: bool = True) -> None:
        path = Path(path)
        self.path, self.classes = path, tuple(classes)
        if not os.path.lexists(path / "recipe.yaml"):
            raise UsageError(f"{path}: not a run folder (no recipe.yaml); make one with prunekit train or import")
        refuse_links_out(path)
        durable.opened(path)
        self.said = read_yaml(path / "recipe.yaml")
        if code:
            trust.check(path, self.said)
        self.recipe = Recipe.resolved(self.said, path / "recipe.yaml")
        try:
            self.device = check_device(self.recipe.device if device is None else device)
        except ValueError as error:
            raise UsageError(f"--device: {error}") from None

    @contextmanager
    def lent(self, *models: nn.Module) -> Iterator[None]:
        """While inside, these models are on the run's device; then they are where they were again."""
        places = [next(model.parameters()).device for model in models]
        try:
            for model in models:
                model.to(self.device)
            yield
        finally:
            for model, place in zip(models, places, strict=True):
                model.to(place)

    @classmethod
    def from_recording(
        cls,
        folder: str | Path,
        trajectory: str | Path,
        *,
        model: str | Callable[..., nn.Module],
        data: str | Path | Callable[..., Any] | None = None,
        model_args: Mapping[str, Any] | None = None,
        data_args: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        **recipe: Any,
    ) -> Run:
        """Makes a run of what a ``Recorder`` left in a training loop, which every verb then works on.

        Args:
            folder: where the run comes to lie.
            trajectory: the folder that was given to ``Recorder``; it stays, and may be ``folder/trajectory``.
            model: the model's factory: a function of a module, or its import path ``"module:function"``.
            data: the data's factory in the same way: train, validation, test and scoring samples; or a file or folder, see
                docs/huggingface.md. The train split must have the loop's samples in the order of their indices.
            model_args, data_args: the factories' keyword arguments; of files the other keys of ``data`` in a recipe.
            recipe: further keys of a recipe: ``task="regression"``, ``prunable={"ignore": [...]}``.

        Raises:
            ArtifactError: there is no whole trajectory, it is another model's, or ``folder`` holds something else.
            UsageError: a factory cannot be imported again, or the data are not the recorded ones.

        Example:
            >>> import torch
            >>> from prunekit import Recorder, Run
            >>> from prunekit.models import digits_mlp
            >>> folder, model = getfixture("tmp_path"), digits_mlp()
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> loader = torch.utils.data.DataLoader(torch.rand(64, 1, 8, 8), 16, shuffle=True)
            >>> with Recorder(folder / "trajectory", model, optimizer) as recorder:
            ...     for x in recorder.watch(loader):
            ...         optimizer.zero_grad()
            ...         model(x).square().mean().backward()
            ...         optimizer.step()
            >>> len(Run.from_recording(folder / "run", folder / "trajectory", model=digits_mlp).trajectory)
            4
        """
        from prunekit.verbs.recorded import data_section, factory, import_recording  # which opens runs

        content = {**recipe, "model": factory(model, model_args, "model")}
        if data is not None:
            content["data"] = data_section(data, data_args)
        import_recording(Recipe.of(content, "Run.from_recording"), placed(trajectory), Path(folder), overwrite)
        return cls(Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *pretrained: str | Path,
        auto: str | None = None,
        data: str | Path | Callable[..., Any] | None = None,
        data_args: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        **recipe: Any,
    ) -> Run:
        """Makes a run of a model in a Hugging Face folder, or of several checkpoints of it; see docs/huggingface.md.

        Args:
            folder: where the run comes to lie.
            pretrained: folders with config.json and safetensors, or LoRA adapters, in the order of training; one of a trainer's
                ``checkpoint-*`` folders stands for these.
            auto: a class of transformers such as ``"AutoModelForCausalLM"``, instead of the config's ``architectures``.
            data, data_args, overwrite, recipe: as of ``from_recording``.

        Raises:
            ArtifactError: a file is missing or damaged or does not fit the class, or ``folder`` holds something else.
            UsageError: transformers is not installed, or knows no such class.

        Example:
            >>> from pathlib import Path
            >>> from prunekit import Run
            >>> Run.from_pretrained(getfixture("tmp_path") / "run", Path("/no/such-folder"))
            Traceback (most recent call last):
            prunekit.errors.ArtifactError: /no/such-folder: no such folder; name a folder with config.json and model.safetensors
        """
        from prunekit.verbs.pretrained import folders_of, import_folders, model_section  # which open runs
        from prunekit.verbs.recorded import data_section

        folders = folders_of(pretrained)
        content = {**recipe, "model": model_section(folders, auto)}
        if data is not None:
            content["data"] = data_section(data, data_args)
        import_folders(Recipe.of(content, "Run.from_pretrained"), folders, Path(folder), overwrite)
        return cls(Path(folder))

    @cached_property
    def trajectory(self) -> Trajectory:
        """What was recorded of training.

        Raises:
            ArtifactError: it is damaged or was cut off, or the run's recipe is not the one that it was recorded with.
        """
        trajectory = Trajectory(self.path / "trajectory", self.recipe.score.optimizer_rules)
        if not trajectory.complete:
            raise ArtifactError(
                f"{trajectory.folder}: recording was cut off after {len(trajectory)} steps; train again with --overwrite"
            )
        noted = trajectory.provenance.get("recipe")
        if isinstance(noted, Mapping):
            now = json.loads(json.dumps(self.recipe.training_facts()))
            noted = {key: value for key, value in noted.items() if key not in OF_THE_MACHINE}
            if (difference := first_difference(noted, as_noted(now, noted))) is not None:
                raise ArtifactError(
                    f"{self.path / 'recipe.yaml'}: not the recipe that {trajectory.folder} was recorded with ({difference}); "
                    "put back what it was, or train again with --overwrite"
                )
        return trajectory

    @cached_property
    def model(self) -> nn.Module:
        """The trained dense model, on the CPU, in evaluation mode."""
        model = self.new_model()
        self.trajectory.layout.check(model)
        load_into(model, self.trajectory.model_state(), self.trajectory.folder)
        return model.eval()

    def new_model(self) -> nn.Module:
        """The dense architecture, for loading a pruned model into."""
        check_config(self.recipe, self.trajectory)
        return self.recipe.build_model(weights=False)

    @cached_property
    def splits(self) -> dict[str, Split]:
        return load_splits(self.recipe)

    @cached_property
    def task(self) -> Task:
        """What the model is for: the recipe's, or what its validation data show."""
        return settled(self.recipe, self.model, self.splits if self.recipe.data is not None else None).load_task()

    @property
    def explained(self) -> int:
        """How many samples at most eval rebuilds; 0 for none."""
        return explained(self.recipe, self.task)

    @property
    def looked_at(self) -> int:
        """How many samples at most explain looks at unless told."""
        return self.explained or _usual(self.task)

    def batches(self, split: str, limit: int | None = None) -> Samples:
        """The first ``limit`` samples; those of ``classes`` alone, where the run is restricted to some.

        Raises:
            UsageError: the split has no sample of one of these classes, or the task has none.
        """
        every = self.splits[split].samples()
        if not self.classes:
            return every.first(limit)
        wanted, masks, classes_of = torch.tensor(self.classes), [], []
        for _, labels in every:
            classes = self.task.classes(labels)
            if classes is None:
                raise UsageError(f"classes {_listed(self.classes)}: the task {self.task.name} has not one class a sample")
            classes_of.append(classes.cpu())
            masks.append(torch.isin(classes.cpu(), wanted))
        mask, found = torch.cat(masks), torch.cat(classes_of)
        if limit is not None:
            mask &= mask.cumsum(0) <= limit
        present = set(found[mask].tolist())
        missing = [c for c in self.classes if c not in present]
        if missing:
            raise UsageError(
                f"classes {_listed(self.classes)}: no {split} sample that is looked at is of class {missing[0]} (score.samples)"
            )
        return every.where(mask)

    def restricted(self, classes: Sequence[int]) -> Run:
        """The same run, restricted to some classes."""
        return Run(self.path, str(self.device), classes)

    @property
    def example(self) -> Inputs:
        """Two validation inputs, for tracing."""
        return self.splits["validation"].batch(range(min(2, len(self.splits["validation"]))))[0]

    @cached_property
    def evidence(self) -> Evidence:
        """What criteria may look at; without samples when the recipe has no data."""
        recipe = self.recipe
        data = self.batches("scoring", recipe.score.samples) if recipe.data is not None else None
        target = recipe.load_target()
        wanted = recipe.prunable
        prunable = tuple(prunable_parameters(self.model, self.trajectory.layout, wanted.ignore, wanted.include))
        return Evidence(
            self.trajectory,
            self.model,
            prunable,
            data,
            self.task,
            self.task.target if target is None else target,
            recipe.seed,
            **recipe.score.options(),
            classes=self.classes,
            kept=tuple(kept_layers(self.model, wanted.ignore)),
            attention=tuple(recipe.structure.mappings()),
            device=self.device,
        )

    def asked(self, **options: Any) -> Evidence:
        """The same with other options, such as a command's."""
        return replace(self.evidence, **options)

    # -- artifacts ---------------------------------------------------------------------------------------------

    @property
    def score_folder(self) -> Path:
        """``RUN/scores``; of a run restricted to classes, ``RUN/scores/classes-3-5``."""
        folder = self.path / "scores"
        return folder / f"classes-{'-'.join(map(str, self.classes))}" if self.classes else folder

    def score_path(self, criterion: str) -> Path:
        """Where the scores of ``criterion`` lie; see ``prunekit.criteria.spec`` for the file name.

        Raises:
            UsageError: there is no such criterion, or it stands for several.
        """
        return self.score_folder / f"{score_slug(criterion)}.safetensors"

    def score_files(self) -> list[Path]:
        """Every score file of the run: in the recipe's order, then by name."""
        listed = [self.score_path(name) for c in self.recipe.score.criteria for name in expand(c)]
        found = self.score_folder.glob("[!.]*.safetensors")
        return sorted(found, key=lambda path: (listed.index(path) if path in listed else len(listed), path.name))

    def scores(self, criterion: str) -> Scores:
        """A score file of this run's trajectory; a composition without a file of its own is made from its parts' files.

        Raises:
            UsageError: there is no such criterion, or it stands for several.
            ArtifactError: missing, damaged, or made from another trajectory, model or parts; both hashes are named.
        """
        spec = parse(criterion)
        path = self.score_path(criterion)
        if not path.is_file():
            lacking = [part.text for part in spec.singles if not self.score_path(part.text).is_file()]
            if not lacking:
                return compose(spec, {part.text: self.scores(part.text) for part in spec.singles})
            wanted = " ".join(f"--criterion {shlex.quote(name)}" for name in lacking)
            raise ArtifactError(f"{self.score_path(lacking[0])}: no such file; make it with: prunekit score {self.path} {wanted}")
        return self.scores_in(path)

    def scores_in(self, path: Path) -> Scores:
        """A score file of this run's trajectory and model.

        Raises:
            ArtifactError: damaged, of another name than its content, or made from another trajectory, model or parts.
        """
        scores = self.recorded_scores(path)
        if scores.provenance["model"] != model_digest(self.model):
            raise ArtifactError(
                f"{path}: made from model {scores.provenance['model']}, this run's is {model_digest(self.model)}; "
                "score again with --overwrite"
            )
        return scores

    def recorded_scores(self, path: Path) -> Scores:
        """A score file of this run's trajectory; the model is not built.

        Raises:
            ArtifactError: damaged, of another name than its content, or made from another trajectory or parts.
        """
        scores = Scores.load(path)
        trust.check_file(self.said, path, scores.every_provenance)
        try:
            belongs = self.score_path(scores.criterion)
        except UsageError as error:
            raise ArtifactError(f"{path}: {error}") from None
        if belongs.name != path.name:
            raise ArtifactError(f"{path}: holds scores of {scores.criterion}, which belong in {belongs.name}")
        if scores.provenance["trajectory"] != self.trajectory.hash:
            raise ArtifactError(
                f"{path}: made from trajectory {scores.provenance['trajectory']}, this run's is {self.trajectory.hash}; "
                "score again with --overwrite"
            )
        for part in scores.provenance.get("parts", ()):
            self._check_part(path, part)
        return scores

    def _check_part(self, path: Path, part: Mapping[str, Any]) -> None:
        """A composed file must be of the scores that its parts' own files hold now, where they exist."""
        own = self.score_path(part["criterion"])
        if not own.is_file():
            return
        found = checkpoint.read_header(own, "scores")["digest"]
        if found != part["digest"]:
            raise ArtifactError(
                f"{path}: made from scores {part['digest']} of {part['criterion']}, {own.name} now holds {found}; "
                "score again with --overwrite"
            )

    def all_scores(self) -> dict[str, Scores]:
        """Every score file of the run, in the recipe's order, then by name.

        Raises:
            ArtifactError: there is none.
        """
        files = self.score_files()
        if not files:
            raise ArtifactError(f"{self.path}: has no scores yet; make them with: prunekit score {self.path} --criterion all")
        return {scores.criterion: scores for scores in map(self.scores_in, files)}


def explained(recipe: Recipe, task: Task) -> int:
    """How many samples at most the kernel's account is of: ``eval.samples``, or what is usual for the task."""
    return _usual(task) if recipe.eval.samples is None else recipe.eval.samples


def _usual(task: Task) -> int:
    return TEXTS if task.measured_in_place else EXPLAINED


def load_splits(recipe: Recipe, fetch: bool = False) -> dict[str, Split]:
    """The recipe's data.

    Args:
        fetch: data sets on the Hugging Face hub may be downloaded: the user named them just now.

    Raises:
        PrunekitError: the run has none.
    """
    if recipe.data is None:
        raise PrunekitError("this run has no data; import the model again with --data")
    task = recipe.load_task()
    if recipe.data.files is not None:
        from prunekit.data.files.reading import read_files

        name = None if recipe.task is None else task.name
        found = read_files(recipe.data.files, recipe.data.options(), task=name, model=recipe.model.pretrained, fetch=fetch)
        return as_splits(found, recipe.data.source, task.batch)
    factory = str(recipe.data.factory)
    return as_splits(call(factory, "data", recipe.data.arguments()), factory, task.batch)


def _listed(classes: Sequence[int]) -> str:
    return ",".join(map(str, classes))


def comparison_inputs(run: Run) -> dict[str, Any] | None:
    """What the run's compare.json was made from; None when there is none."""
    return recorded_inputs(run.path / "compare.json", lambda path: Comparison.load(path).made_from)
