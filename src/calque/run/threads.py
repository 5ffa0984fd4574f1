"""How many threads torch computes with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_COUNTING = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread here; other threads of the process, and those that are yet to start, keep their number.

    torch.set_num_threads counts for the thread that calls it, and for every thread that first computes afterwards. A thread
    that lasts no longer than its own call sets what new ones find.
    """
    with _COUNTING:
        threads = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)
            restoring = threading.Thread(target=torch.set_num_threads, args=(threads,))
            restoring.start()
            restoring.join()
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
