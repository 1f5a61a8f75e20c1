"""The ways in which a run ends before it is done."""


class UsageError(ValueError):
    """The run cannot start as it was asked for; nothing was written."""


class RunError(RuntimeError):
    """The run started, and did not get where it should."""


class Terminated(Exception):  # noqa: N818
    """The run was told to end by SIGTERM; a checkpoint of its last step was written."""
