"""What would recipes/cifar2-resnet9.yaml cost here? Its model, data reader, recorder and scores at full size, a few steps.

    python benchmarks/cifar2_cost.py [--steps 4] [--samples 4]

Seconds are processor seconds, of all threads together. Images are drawn at random into files of CIFAR-10's format and full
length, so nothing is downloaded and nothing is learnt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from prunekit import Recorder, Trajectory
from prunekit.criteria import peak_memory_mb
from prunekit.data import Split, cifar2
from prunekit.data.cifar import TEST, TRAIN
from prunekit.kernel import ModelFunction, attribute
from prunekit.measure import machine
from prunekit.recipe import Recipe
from prunekit.training import TrainOptions, batches_per_epoch, train
from prunekit.trajectory import Layout, disk_needed

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cifar2-resnet9.yaml"
IMAGES = 10_000  # a file


def generated(folder: Path) -> Path:
    """Every label equally often, as in CIFAR-10."""
    generator = np.random.default_rng(0)
    for name in (*TRAIN, TEST):
        records = generator.integers(0, 256, (IMAGES, 3073), np.uint8)
        records[:, 0] = np.arange(IMAGES) % 10
        (folder / name).write_bytes(records.tobytes())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps")
    parser.add_argument("--samples", type=int, default=4, help="scoring samples")
    options = parser.parse_args()
    recipe = Recipe.load(RECIPE)
    with tempfile.TemporaryDirectory() as scratch:
        splits = {name: Split(pair) for name, pair in cifar2(str(generated(Path(scratch)))).items()}
        model = recipe.build_model()
        samples, size = len(splits["train"]), recipe.train.batch_size
        steps = recipe.train.epochs * batches_per_epoch(samples, size, recipe.train.drop_last)
        optimizer, scheduler = recipe.build_optimizer(model, steps)
        kept = recipe.train.record.model_dump(exclude={"snapshot_every"})
        disk = disk_needed(model, steps, samples * recipe.train.epochs, **kept)
        print(
            f"{machine()}: {Layout.of(model).total:,} parameters, {steps} steps of {size} of {samples:,} images; "
            f"{disk / 1e9:.2f} GB of trajectory"
        )
        ended: list[float] = []
        with Recorder(Path(scratch) / "path", model, optimizer, scheduler=scheduler) as recorder:
            started = time.process_time()
            train(
                model, optimizer, scheduler, TrainOptions(
                    splits["train"].batch, samples, task=recipe.load_task(), epochs=1, batch_size=size, drop_last=True,
                    augment=recipe.load_augment(),
                ),
                recorder=recorder, end=options.steps, after_step=lambda steps: ended.append(time.process_time()),
            )  # fmt: skip
        # The first step pays for what later ones find ready.
        each = (ended[-1] - ended[0]) / (len(ended) - 1) if len(ended) > 1 else ended[0] - started
        print(f"training: {each:.1f} s a step, {each * steps / 60:.0f} min for all; peak memory {peak_memory_mb():,} MB")
        path, (x, y) = Trajectory(Path(scratch) / "path"), splits["scoring"].batch(range(options.samples))
        function, gradients = ModelFunction(model, path.layout, path.fixed, recipe.load_target()), 0
        started = time.process_time()
        for part in attribute(function, path.segments, x, y):
            gradients += len(path) * (part.samples.stop - part.samples.start)
        each = (time.process_time() - started) / gradients
        print(
            f"influence: {each:.3f} s a gradient, {each * steps * recipe.score.samples / 60:.0f} min for the recipe's "
            f"{recipe.score.samples} samples with one node a step; peak memory {peak_memory_mb():,} MB"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
