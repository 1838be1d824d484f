"""Several processes that run one program: how they find each other, and how all end when one ends.

On Cloud TPU, GKE, Slurm and Open MPI, JAX finds the coordinator, the number of processes and the number of
this process. Otherwise set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
JAX_PROCESS_ID; JAX_NUM_PROCESSES = 1 alone keeps JAX from searching. BABEL_HEARTBEAT_SECONDS: the time after
which a silent process ends the others. BABEL_CONNECT_SECONDS: the time to wait for all processes at the
start.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

from babel_jax.distributed.ending import begin_to_end, end, end_together, watch, watches
from babel_jax.errors import BadInput, Preempted, one_line

log = logging.getLogger("babel")

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HEARTBEAT_SECONDS = 60
_SECONDS_TO_CONNECT = 300
# Parts of the messages of collective operations (Gloo, NCCL, gRPC) when another process has ended.
_SIGNS_OF_A_LOST_PROCESS = (
    "gloo",
    "nccl",
    "connection reset by peer",
    "connection closed by peer",
    "coordination service",
    "socket closed",
)


def join() -> None:
    """Joins the other processes of the job, as the environment describes it; does nothing if there is one
    process.

    It must be called before any other use of JAX. Afterwards only process 0 logs. Raises BadInput if the
    environment is incomplete, and ends the process with status 1 if the others do not come.
    """
    import jax

    if jax.distributed.is_initialized():
        return
    by_hand = _by_hand(os.environ)
    heartbeat = _number(os.environ, "BABEL_HEARTBEAT_SECONDS", _HEARTBEAT_SECONDS, least=1)
    # Empty: the user said that there is one process. None: no variable is set, so the cluster decides.
    if by_hand == {} or (by_hand is None and not _cluster_of_several()):
        return
    seconds = _number(os.environ, "BABEL_CONNECT_SECONDS", _SECONDS_TO_CONNECT, least=1)
    # If the others do not come, JAX aborts with a stack trace. This timer prints one line before that.
    late = threading.Timer(seconds, _nobody_came, [by_hand, seconds])
    late.start()
    try:
        jax.distributed.initialize(
            **(by_hand or {}),
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except Exception as error:  # the cluster's libraries raise errors of many types
        raise BadInput(f"the processes of the job cannot be joined: {_one_line(error)}") from None
    finally:
        late.cancel()
    watch()
    # Gloo prints to standard output, which must have the command's result alone.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Python keeps a copy of the old standard output. Code in C writes to descriptor 1, now standard error.
    os.dup2(2, 1)
    if jax.process_index() != 0:
        log.setLevel(logging.WARNING)
    log.info("%d processes, %d devices", jax.process_count(), jax.device_count())


def _nobody_came(by_hand: Mapping[str, Any] | None, seconds: int) -> NoReturn:
    others = (
        "the other processes of the job"
        if by_hand is None
        else "all {num_processes} processes at {coordinator_address}".format(**by_hand)
    )
    print(
        f"babel: {others} did not come together within {seconds} s; see that each is started and reaches "
        "the first",
        file=sys.stderr,
    )
    end(1)


def speaks() -> bool:
    """True if this process prints the command's result: process 0, or the only process."""
    return not joined() or _jax().process_index() == 0


def leave(status: int, line: str) -> int:
    """The exit status of a command that failed with the message `line`. If there are several processes, this
    one ends here, and the others end with the same status.

    An ordinary exit would first wait for the others, which may be in a collective operation that waits for
    this process.
    """
    if joined():
        end_together(status, line)
    return status


def begin_to_leave() -> None:
    """To be called before a command that failed says so; see `leave`."""
    if joined():
        begin_to_end()


def lost_process(error: BaseException | None) -> str | None:
    """One line for an error caused by the end of another process; None for other errors, and for None."""
    # Our own messages may contain any folder name, so only their causes are searched.
    while isinstance(error, (BadInput, Preempted)):
        error = error.__cause__
    if error is None:
        return None
    text = str(error).lower()
    if not joined() or not any(sign in text for sign in _SIGNS_OF_A_LOST_PROCESS):
        return None
    jax = _jax()
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another one of the job, whose own "
        f"output says why ({_one_line(error)}); start all again with the same command, which resumes at "
        "the last checkpoint"
    )


def _by_hand(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` from variables set by hand; None if none is set, empty
    for one process.
    """
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return {}
    # In a cluster the address may be set alone: the cluster has the two numbers itself.
    missing = [name for name in _BY_HAND if not environment.get(name)]
    if len(missing) == len(_BY_HAND) or (
        missing == ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"] and _cluster_of_several()
    ):
        return None

    # Some variables are set: all are needed.
    if missing:
        given = ", ".join(name for name in _BY_HAND if name not in missing)
        raise BadInput(
            f"environment: {given} without {', '.join(missing)}; processes started by hand need all of "
            f"{', '.join(_BY_HAND)}"
        )
    address, processes = environment[_BY_HAND[0]], _number(environment, "JAX_NUM_PROCESSES", 0, least=1)
    process = _number(environment, "JAX_PROCESS_ID", 0, least=0)
    if process >= processes:
        raise BadInput(
            f"environment: JAX_PROCESS_ID = {process}, and JAX_NUM_PROCESSES = {processes}; processes are "
            "counted from 0"
        )
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise BadInput(f"environment: JAX_COORDINATOR_ADDRESS = {address} is not of the form host:port")
    return {"coordinator_address": address, "num_processes": processes, "process_id": process}


def _cluster_of_several() -> bool:
    """True if JAX sees a cluster of several processes.

    Raises BadInput if there are signs of a cluster that JAX cannot read.
    """
    # The check of `jax.distributed.initialize()`; it has no public form.
    from jax._src.clusters import (
        ClusterEnv,
        K8sCluster,
    )

    _check_signs(os.environ)
    # A Kubernetes pod has a number only in an indexed Job.
    kinds = [
        kind
        for kind in ClusterEnv._cluster_types
        if kind is not K8sCluster or "JOB_COMPLETION_INDEX" in os.environ
    ]
    try:
        for kind in kinds:
            if not kind.opt_in_only_method and _is_present(kind):
                return kind.get_process_count() > 1
        return False
    except Exception as error:  # metadata servers and Kubernetes
        raise BadInput(
            f"environment: signs of a cluster, but its size cannot be learned: {_one_line(error)}; "
            "JAX_NUM_PROCESSES=1 is for one process"
        ) from None


def _is_present(kind: Any) -> bool:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        present = kind.is_env_present()
    if warned and not present:  # Kubernetes, but its Python package is missing
        raise ValueError(str(warned[0].message))
    return bool(present)


def _check_signs(environment: Mapping[str, str]) -> None:
    """Raises BadInput for the variables of a cluster that are incomplete."""
    # Without a TPU, libtpu writes such warnings into environment variables, and child processes inherit them.
    environment = {
        name: value
        for name, value in environment.items()
        if not value.startswith("WARNING: could not determine")
    }

    def several(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    if several("SLURM_NTASKS") and "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" not in environment:
        tasks = environment["SLURM_NTASKS"]
        raise BadInput(
            f"environment: SLURM_NTASKS = {tasks}, but no SLURM_STEP_NODELIST with the hostnames; start the "
            "command with srun"
        )
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    if several("MEGASCALE_NUM_SLICES") and not environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        slices = environment["MEGASCALE_NUM_SLICES"]
        raise BadInput(
            f"environment: MEGASCALE_NUM_SLICES = {slices}, but no MEGASCALE_COORDINATOR_ADDRESS; set it to "
            "the host of slice 0"
        )
    if (
        any(len(environment.get(name, "").split(",")) > 1 for name in hosts)
        and not environment.get("TPU_WORKER_ID", "").isdecimal()
    ):
        raise BadInput(
            "environment: hostnames of several TPU workers, but no TPU_WORKER_ID; set it to this worker's "
            "place among them"
        )
    if environment.get("TPU_WORKER_ID", "0") not in ("", "0") and not any(
        environment.get(name) for name in hosts
    ):
        worker = environment["TPU_WORKER_ID"]
        raise BadInput(
            f"environment: TPU_WORKER_ID = {worker}, but no TPU_WORKER_HOSTNAMES; set it to the hostnames "
            "of all workers"
        )


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise BadInput(f"environment: {name} = {text} is not a whole number of {least} or more")
    return int(text)


def _one_line(error: BaseException) -> str:
    return one_line(error, 300) or type(error).__name__


def joined() -> bool:
    """True if this process is one of several."""
    # If JAX is not imported yet, the process has not joined; `babel --help` must not import JAX.
    return watches() or ("jax" in sys.modules and _jax().distributed.is_initialized())


def _jax() -> Any:
    import jax

    return jax
