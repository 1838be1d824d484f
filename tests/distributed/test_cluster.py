"""What the environment says of the processes of a job, and what is said where it says half of it."""

import os
import socket
import subprocess
import sys

import jax
import pytest
from jax._src.clusters import ClusterEnv

from babel_jax.distributed import cluster
from babel_jax.errors import BadInput

SIGNS = ("JAX_", "BABEL_", "SLURM_", "TPU_", "MEGASCALE_", "OMPI_", "KUBERNETES_", "JOB_")
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


@pytest.fixture
def joined(monkeypatch):
    """Calls `join` with these variables alone; gives what was handed to JAX, None where nothing was."""
    for name in os.environ:
        if name.startswith(SIGNS):
            monkeypatch.delenv(name)

    def call(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        handed = []

        def initialize(**arguments):
            handed.append(arguments)
            raise RuntimeError("enough\nof this")

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        try:
            cluster.join()
        except BadInput as error:
            if str(error) != "the processes of the job cannot be joined: enough of this":
                raise
        return handed[0] if handed else None

    return call


def test_one_process_is_not_joined(joined):
    assert joined() is None


def test_one_task_of_slurm_is_not_joined(joined):
    assert joined(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_a_pod_that_is_none_of_a_job_is_not_joined(joined):
    assert joined(KUBERNETES_SERVICE_HOST="10.0.0.1") is None


def test_processes_started_by_hand(joined):
    handed = joined(
        JAX_COORDINATOR_ADDRESS="10.0.0.1:8476",
        JAX_NUM_PROCESSES="4",
        JAX_PROCESS_ID="3",
        BABEL_HEARTBEAT_SECONDS="20",
    )
    assert handed["coordinator_address"] == "10.0.0.1:8476"
    assert (handed["num_processes"], handed["process_id"]) == (4, 3)
    assert (handed["heartbeat_timeout_seconds"], handed["shutdown_timeout_seconds"]) == (20, 20)


def test_slurm_is_left_to_jax(joined):
    handed = joined(**SLURM)
    assert set(handed) == {"initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"}
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 1)
    assert found[0].startswith("node03:")
    assert found[1:3] == (2, 1)


def test_one_process_by_hand_keeps_jax_from_looking(joined):
    assert joined(**SLURM | {"JAX_NUM_PROCESSES": "1"}) is None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"},
            (
                "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID without JAX_NUM_PROCESSES; processes started by "
                "hand need all of"
            ),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES, JAX_PROCESS_ID",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID = 2.*counted from 0",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES = two is not a whole",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS = a is not of the form",
        ),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},
            "no SLURM_STEP_NODELIST with the hostnames; start.* with srun",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            "signs of a cluster.*Kubernetes.*JAX_NUM_PROCESSES=1",
        ),
        (
            {"TPU_WORKER_ID": "3"},
            "TPU_WORKER_ID = 3, but no TPU_WORKER_HOSTNAMES; set it to the hostnames of all workers",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "hostnames of several TPU workers, but no TPU_WORKER_ID"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES = 2, but no MEGASCALE_COORDINATOR_ADDRESS"),
        ({"BABEL_HEARTBEAT_SECONDS": "0"}, "BABEL_HEARTBEAT_SECONDS = 0 is not a whole number of 1 or more"),
    ],
)
def test_half_an_environment_is_refused_in_one_line(joined, variables, words):
    with pytest.raises(BadInput, match=words) as raised:
        joined(**variables)
    assert "\n" not in str(raised.value)


def test_processes_that_do_not_come_are_waited_for_so_long_and_may_come_next_time():
    """Exit status 2 would tell the scripts for pods that no other start can go better."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "BABEL_CONNECT_SECONDS": "1",
    }
    environment |= {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    command = [sys.executable, "-c", "from babel_jax.distributed.cluster import join; join()"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.endswith(
        "did not come together within 1 s; see that each is started and reaches the first\n"
    )
