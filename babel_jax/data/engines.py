"""Where tasks run: here, in processes of this machine, or on a Ray cluster. A task is a function of one argument that writes files.

Each task leaves its result on disk in one step and is a function of its argument alone, so that one whose process was killed is done
again, and the order in which they finish makes no difference.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from babel_jax.config import DataSettings, Engine
from babel_jax.errors import BadInput

Task = TypeVar("Task")
Result = TypeVar("Result")

_ATTEMPTS = 3


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], settings: DataSettings) -> Iterator[tuple[Task, Result]]:
    """Runs `function` (of a module, so that other processes find it) on each task; gives the tasks with their results as they finish.

    Raises what a task raises, and BadInput when processes are killed again and again.
    """
    workers = min(settings.workers or os.cpu_count() or 1, len(tasks))
    if settings.engine is Engine.RAY:
        yield from _on_ray(function, tasks)
    elif workers <= 1:
        for task in tasks:
            yield task, function(task)
    else:
        yield from _in_processes(function, tasks, workers)


def _in_processes(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    left = dict(enumerate(tasks))
    fruitless = 0
    while left:
        before = len(left)
        # Forked processes would inherit the threads' locks of JAX, Arrow and the tokenizers.
        with _quiet_workers(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(function, task): number for number, task in left.items()}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    yield left.pop(futures[future]), result
            except BrokenProcessPool:
                fruitless = 0 if len(left) < before else fruitless + 1
                if fruitless == _ATTEMPTS:
                    raise BadInput(
                        f"worker processes were killed {_ATTEMPTS} times, likely for want of memory; "
                        "set data.workers or data.shard_documents lower"
                    ) from None
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


@contextlib.contextmanager
def _quiet_workers() -> Iterator[None]:
    """Processes started meanwhile draw no progress bars of their own."""
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _on_ray(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """On the cluster of RAY_ADDRESS, else on one that is started on this machine; Ray itself does killed tasks again."""
    try:
        import ray
    except ImportError:
        raise BadInput("data.engine = \"ray\" needs the package ray; pip install 'babel-jax[ray]'") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    remote: Any = ray.remote(max_retries=_ATTEMPTS)(function)
    waiting = {remote.remote(task): task for task in tasks}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except ray.exceptions.RayError as error:
                raise BadInput(f"a task was lost on Ray: {' '.join(str(error).split())[:200]}") from error
            yield waiting.pop(done), result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
