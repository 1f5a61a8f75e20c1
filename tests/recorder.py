"""A dispatch mode that tests share."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Collects the calls of the library's own operators: each function, its arguments and its keywords."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "ssmscan":
            self.calls.append((function, arguments, keywords or {}))
        return function(*arguments, **(keywords or {}))
