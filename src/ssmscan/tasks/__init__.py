"""Tasks: seeded sources of batches, with their metrics and a rendering of their answers."""

from ssmscan.tasks.associative_recall import AssociativeRecall
from ssmscan.tasks.copying import Copying
from ssmscan.tasks.induction_heads import InductionHeads
from ssmscan.tasks.selective_copying import SelectiveCopying
from ssmscan.tasks.task import IGNORE, Batch, Measure, Split, Task, cross_entropy
from ssmscan.tasks.text import Text

# By the name that a recipe gives.
TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Copying, SelectiveCopying, InductionHeads, AssociativeRecall, Text)
}

__all__ = [
    "IGNORE",
    "TASKS",
    "AssociativeRecall",
    "Batch",
    "Copying",
    "InductionHeads",
    "Measure",
    "SelectiveCopying",
    "Split",
    "Task",
    "Text",
    "cross_entropy",
]
