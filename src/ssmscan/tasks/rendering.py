"""How recall tasks show an example to a person."""

import string
from collections.abc import Callable

from torch import Tensor

from ssmscan.tasks.task import IGNORE

# A symbol each.
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
# Of a longer sequence so much is shown of its beginning, and of its end (characters).
_SHOWN = 60


def show_recall(sequence: str, targets: Tensor, predictions: Tensor, name: Callable[[int], str]) -> str:
    """``sequence``, the answer, the model's answer, and how much of it is right; ``name`` tells a token."""
    asked = targets != IGNORE
    answer, given = targets[asked].tolist(), predictions[asked].tolist()
    right = sum(a == g for a, g in zip(answer, given, strict=True))
    if len(sequence) > 3 * _SHOWN:
        left_out = len(sequence) - 2 * _SHOWN
        sequence = f"{sequence[:_SHOWN]} … {left_out} more … {sequence[-_SHOWN:]}"
    rows = (
        ("sequence", sequence),
        ("answer", " ".join(map(name, answer))),
        ("model", " ".join(map(name, given)) + f"   {right} of {len(answer)} right"),
    )
    return "\n".join(f"{title:<9} {text}" for title, text in rows)
