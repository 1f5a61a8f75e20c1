"""SIGTERM, which a batch system sends some time before it takes the machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """In here SIGTERM does nothing but make what is yielded return True, for the one in charge to end in order.

    Signals are the main thread's: in another it acts as it did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
