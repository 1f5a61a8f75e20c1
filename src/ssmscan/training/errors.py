"""The two ways in which a run fails."""


class UsageError(ValueError):
    """The run cannot start as it was asked for; nothing was written."""


class RunError(RuntimeError):
    """The run started, and did not get where it should."""
