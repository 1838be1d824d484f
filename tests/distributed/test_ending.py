"""Where one of several processes fails, all end with its status, each with one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_that_fails.py")
COUNT = 2


def run(who_and_how):
    """(Exit status, lines of babel, all of standard error) of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(COUNT),
    }
    started = []
    for number in range(COUNT):
        environment = common | {"JAX_PROCESS_ID": str(number)}
        command = [sys.executable, SCRIPT, who_and_how]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    told = [[line for line in errors.splitlines() if line.startswith("babel: ")] for errors in said]
    return [(process.returncode, *rest) for process, *rest in zip(started, told, said, strict=True)]


@pytest.mark.parametrize(
    ("who", "how", "status"),
    # Process 0 has the coordination service: JAX aborts the others where it goes first.
    [(1, "agreed", 2), (0, "alone", 2), (1, "alone", 2), (0, "late", 2), (1, "late", 2), (0, "crash", 1)],
)
def test_all_processes_end_with_one_status_and_one_line(who, how, status):
    ended = run(f"{who}:{how}")
    assert [found for found, _, _ in ended] == [status] * COUNT, ended
    _, own, said = ended[who]
    _, of_other, said_of_other = ended[1 - who]
    if how == "crash":
        assert "ValueError: a bug" in said
        assert of_other == ["babel: process 0 of 2 ended: a bug"]
        return
    assert own == ["babel: refused for a reason"], said
    if how == "agreed":
        assert of_other == [f"babel: refused for a reason (process {who} of 2)"]
    else:
        assert of_other == [f"babel: process {who} of 2 ended: refused for a reason"], said_of_other
    assert "Traceback" not in said + said_of_other
    assert "fatal" not in said + said_of_other
