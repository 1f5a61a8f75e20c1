"""Tasks: seeded sources of batches, with the metric and a rendering of their answers."""

from ssmscan.tasks.copying import Copying
from ssmscan.tasks.selective_copying import SelectiveCopying
from ssmscan.tasks.task import IGNORE, Batch, Split, Task, accuracy

__all__ = ["IGNORE", "Batch", "Copying", "SelectiveCopying", "Split", "Task", "accuracy"]
