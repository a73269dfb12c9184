"""What train prints."""

from __future__ import annotations

from prunekit.report.tables import trained
from prunekit.report.terminal.tables import again
from prunekit.training.record import TrainingRecord

LEARNT = 0.98
"""The first epoch with this accuracy is printed: on training data it memorises, on validation data it generalises."""


def show_trained(result: tuple[TrainingRecord, bool]) -> None:
    record, reused = result
    found, told = trained(record), f"train: {record.steps} steps in {record.cost['seconds']:.1f} s"
    if found is not None:
        measure, figures = found
        train, validation = (measure.spaced(figures[split]).replace(" %", "%") for split in ("train", "validation"))
        on = {split: f"{some:,} samples of " for split, some in (record.samples or {}).items()}
        told += f", {measure.title} {train} on {on.get('train', '')}training, "
        told += f"{validation} on {on.get('validation', '')}validation data"
    print(f"{told}{again(reused)}")
    if (watched := record.accuracies) and record.accuracy is not None:
        print(
            f"  {LEARNT:.0%} right: training data {_reached(watched, 'train')}, validation data {_reached(watched, 'validation')}"
        )


def _reached(watched: list[dict[str, float]], split: str) -> str:
    first = next((row["epoch"] for row in watched if row[split] >= LEARNT), None)
    return "never" if first is None else f"at epoch {first}"
