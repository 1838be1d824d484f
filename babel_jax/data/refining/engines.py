"""Runs tasks: in this process, in processes of this machine, or on a Ray cluster. A task is a function of one
argument that writes files.

The result of a task depends on its argument alone and appears on disk in one step. So a task whose process
was killed can be repeated, and the order in which tasks finish makes no difference.
"""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from babel_jax.config import Engine
from babel_jax.distributed.signals import deaf_children, held_back
from babel_jax.errors import BadInput, one_line
from babel_jax.languages import Language, declare, declared

log = logging.getLogger("babel")

Task = TypeVar("Task")
Result = TypeVar("Result")

_ATTEMPTS = 3


class Workers(Protocol):
    """Runs tasks."""

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Runs `function` on each task; yields the tasks with their results as they finish. The function must
        belong to a module, so that other processes can import it.

        Raises the error of a task, and BadInput if its process is killed repeatedly.
        """


@contextlib.contextmanager
def open_workers(engine: Engine, number: int) -> Iterator[Workers]:
    """The workers of an engine. `number` is the number of processes; 0 means one for each core. Ray always
    uses the whole cluster.
    """
    if engine is Engine.RAY:
        yield _RayWorkers()
        return
    number = number or os.cpu_count() or 1
    if number == 1:
        yield _NoWorkers()
        return
    processes = _Processes(number)
    try:
        yield processes
    finally:
        processes.close()


class _NoWorkers:
    """Runs tasks in this process."""

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        for task in tasks:
            yield task, function(task)


class _Processes:
    """Processes of this machine, started with the first task, and again if one of them was killed."""

    def __init__(self, number: int):
        self._number = number
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        # Tasks by number: a task need not be hashable.
        missing = dict(enumerate(tasks))
        languages = declared()
        fruitless = 0
        while missing:
            before = len(missing)
            # Forked processes would inherit the locks of the threads of JAX, Arrow and the tokenizers.
            self._pool = self._pool or ProcessPoolExecutor(
                self._number, multiprocessing.get_context("spawn"), _end_with_parent
            )
            with _quiet(), deaf_children():
                futures = {}
                for number, task in missing.items():
                    futures[self._pool.submit(_run, function, languages, task)] = number
            try:
                for future in as_completed(futures):
                    result = future.result()
                    number = futures.pop(future)
                    yield missing.pop(number), result
            except BrokenProcessPool:
                self.close()
                # A run that finishes some tasks between two kills makes progress, and may try again.
                fruitless = 0 if len(missing) < before else fruitless + 1
                if fruitless == _ATTEMPTS:
                    raise BadInput(
                        f"worker processes were killed {_ATTEMPTS} times, likely for want of memory; "
                        "set data.workers or data.shard_documents lower"
                    ) from None

    def close(self) -> None:
        """Waits for the tasks that have begun, and ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _run(function: Callable[[Task], Result], languages: Sequence[Language], task: Task) -> Result:
    """A task in another process, which gets the languages that were declared in this one."""
    declare(languages)
    return function(task)


def _end_with_parent() -> None:
    """Ends this process when its parent is killed. Otherwise it would wait for ever, or write into a folder
    that another process uses by then.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Processes that are started meanwhile show no progress bars."""
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class _RayWorkers:
    """The Ray cluster of RAY_ADDRESS, else a new one on this machine.

    Ray itself repeats killed tasks.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise BadInput(
                "data.engine = \"ray\" needs the package ray; pip install 'babel-jax[ray]'"
            ) from None
        self._ray = ray
        if not ray.is_initialized():
            # Ray's own signal handler would end a run with status 15 and without a checkpoint. A signal while
            # Ray starts would leave its processes.
            with held_back(signal.SIGTERM):
                ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        remote: Any = self._ray.remote(max_retries=_ATTEMPTS)(_run)
        languages = declared()
        unstarted = iter(tasks)
        waiting: dict[Any, Task] = {}
        try:
            while True:
                # Few tasks at a time, so that few are unfinished after an error. They cannot be cancelled: to
                # cancel a task that is just ending can abort this process (Ray 2.60, "Tried to complete task
                # that was not pending"). The number is read again, because a cluster may grow meanwhile.
                at_once = 1 + max(1, int(self._ray.cluster_resources().get("CPU", 1)))
                for task in itertools.islice(unstarted, max(0, at_once - len(waiting))):
                    waiting[remote.remote(function, languages, task)] = task
                if not waiting:
                    return
                (done,), _ = self._ray.wait(list(waiting), num_returns=1)
                task = waiting.pop(done)
                try:
                    result = self._ray.get(done)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause or error from None
                except self._ray.exceptions.RayError as error:
                    raise BadInput(f"a task was lost on Ray: {one_line(error, 200)}") from error
                yield task, result
        finally:
            # No task may write after another process has got the folder.
            if waiting:
                log.warning("waiting for %d tasks on Ray that are under way", len(waiting))
                self._ray.wait(list(waiting), num_returns=len(waiting))
