"""Tasks done by processes of one thread each, by joblib's backend."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from calque.run.processes import Owner, end_with

IDLE = 15  # seconds after which a worker without work ends: a process that ends waits for them

Task = TypeVar("Task")


def run_by_workers(do: Callable[[Task, Owner], None], tasks: Sequence[Task], workers: int) -> None:
    """Does all tasks, `workers` at a time; the first error of one is raised.

    Args:
        do: called with a task and with this process, whose end a worker notices; it can be pickled.
        tasks: what can be pickled and is small.
    """
    import joblib  # here: a run without workers does not wait for it
    from joblib.parallel import LokyBackend

    owner, (backend, _) = Owner.current(), joblib.parallel.get_active_backend()
    alone: Any = {"initializer": end_with, "initargs": (owner,), "idle_worker_timeout": IDLE}
    parallel = joblib.Parallel(n_jobs=workers, **(alone if isinstance(backend, LokyBackend) else {}))
    parallel(joblib.delayed(do)(task, owner) for task in tasks)
