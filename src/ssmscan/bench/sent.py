"""What a process gives to collectives."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(TorchDispatchMode):
    """The ``bytes`` that this process gives to each collective that is called meanwhile, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            # Those of c10d have their results before what they are given, where these are others.
            behind = function.namespace == "c10d" and (
                "allgather" in str(function) or "reduce_scatter" in str(function)
            )
            given = args[1] if behind else args[0]
            self.bytes.append(sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor)))
        return function(*args, **(kwargs or {}))
