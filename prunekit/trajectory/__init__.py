"""Leave and read a trajectory: the recorder, the store, and what each optimizer's step is made of."""

from prunekit.trajectory.continued import Continued, parent_facts
from prunekit.trajectory.imported import write_checkpoints
from prunekit.trajectory.layout import Entry, Layout
from prunekit.trajectory.loading import load_into
from prunekit.trajectory.polygon import Polygon
from prunekit.trajectory.recorder import Recorder
from prunekit.trajectory.replay import replay
from prunekit.trajectory.rules import StepLog
from prunekit.trajectory.trajectory import Segment, Trajectory
from prunekit.trajectory.weights import read_weights
from prunekit.trajectory.writer import disk_needed, room_for

__all__ = [
    "Continued", "Entry", "Layout", "Polygon", "Recorder", "Segment", "StepLog", "Trajectory", "disk_needed", "load_into",
    "parent_facts", "read_weights", "replay", "room_for", "write_checkpoints",
]  # fmt: skip
