"""A run folder belongs to one job, also where hosts share the disk.

Hosts are told apart by what `_machine` gives.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from babel_jax import lease
from babel_jax.errors import BadInput
from babel_jax.lease import alone_in, leased
from babel_jax.locks import only_process_in

BEAT = 0.02
# Holds a folder as another host would, with a lock that this one does not see, until its input ends or it is
# killed.
HOLDER = """
import contextlib, sys
from pathlib import Path
from babel_jax import lease
lease._machine = lambda: "another machine"
lease.only_process_in = lambda folder: contextlib.nullcontext()
with lease.leased(Path(sys.argv[1]), float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A folder that a job on another host holds, and its process."""
    command = [sys.executable, "-c", HOLDER, tmp_path, str(BEAT)]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield tmp_path, process
        process.kill()


def test_a_job_on_another_host_is_refused_while_the_first_is_alive(held):
    folder, process = held
    # Patient enough for a loaded machine: the answer comes with the first beat that is seen.
    with (
        pytest.raises(BadInput, match=rf"{folder}: another job is at work in it \(process {process.pid} on "),
        leased(folder, 1.0),
    ):
        pass
    assert process.poll() is None
    process.communicate()
    assert process.returncode == 0
    assert not (folder / lease.NAME).exists()


def test_a_job_whose_beats_a_disk_shows_a_minute_late_is_alive(tmp_path, monkeypatch):
    """As gcsfuse does by default. Time is a number here, which sleeping adds to."""
    now, path = [0.0], tmp_path / lease.NAME

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 60:
            path.write_text(path.read_text().replace('"beat": 5', '"beat": 11'))

    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    path.write_text(json.dumps({"holder": "x", "machine": "another", "host": "far", "process": 1, "beat": 5}))
    with pytest.raises(BadInput, match="another job is at work in it"), leased(tmp_path):
        pass


def test_the_lease_of_a_killed_job_is_taken_over(held, caplog):
    folder, process = held
    process.kill()
    process.wait()
    with caplog.at_level("INFO", "babel"), leased(folder, BEAT):
        assert "waiting" in caplog.text
        assert json.loads((folder / lease.NAME).read_text())["machine"] == lease._machine()
    assert not (folder / lease.NAME).exists()


def test_a_holder_that_was_replaced_ends(held):
    folder, process = held
    other = json.loads((folder / lease.NAME).read_text()) | {"holder": "someone", "host": "elsewhere"}
    lease.write_text(folder / lease.NAME, json.dumps(other))
    _, errors = process.communicate(timeout=60) if process.wait(60) else ("", "")
    assert process.returncode == 2
    assert "taken over by a job on elsewhere; this one ends" in errors


def test_on_the_same_host_nothing_is_waited_for(tmp_path, monkeypatch):
    with (
        leased(tmp_path),
        pytest.raises(BadInput, match="another process is at work in it"),
        leased(tmp_path),
    ):
        pass
    # Killed here: the lock is gone, the file is not.
    (tmp_path / lease.NAME).write_text(lease._lease("killed", 3))
    monkeypatch.setattr(lease, "_wait_for_silence", lambda *_: pytest.fail("waited"))
    with leased(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_file_that_is_no_lease_stands_in_nobodys_way(tmp_path, text):
    (tmp_path / lease.NAME).write_text(text)
    with leased(tmp_path):
        pass


@pytest.fixture
def without_locks(monkeypatch):
    """As on file systems without flock (ENOLCK)."""

    def fail(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("babel_jax.locks.fcntl.flock", fail)


def test_on_a_disk_without_locks_a_second_job_is_refused_and_the_first_lives(tmp_path, without_locks):
    # The beats of the first are seen by the second, though both are this process.
    with leased(tmp_path, BEAT):
        before = json.loads((tmp_path / lease.NAME).read_text())["holder"]
        with pytest.raises(BadInput, match="another job is at work in it"), leased(tmp_path, 1.0):
            pass
        assert json.loads((tmp_path / lease.NAME).read_text())["holder"] == before
    assert not (tmp_path / lease.NAME).exists()


def test_on_a_disk_without_locks_a_killed_job_s_lease_is_taken_at_once(tmp_path, without_locks):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    found = {"holder": "x", "machine": lease._machine(), "host": "h", "process": int(ended.stdout), "beat": 3}
    (tmp_path / lease.NAME).write_text(json.dumps(found))
    with leased(tmp_path, 3600.0):
        assert json.loads((tmp_path / lease.NAME).read_text())["holder"] != "x"


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 5000, '{"machine": 1, "process": "x"}'])
def test_damaged_leases(tmp_path, content):
    (tmp_path / lease.NAME).write_text(content)
    with leased(tmp_path, BEAT):
        assert json.loads((tmp_path / lease.NAME).read_text())["process"] > 0


def test_who_waits_for_another_process_says_so_and_not_for_ever(tmp_path, monkeypatch, caplog):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(lease, "_LONGEST_WAIT_HOURS", 0.1)
    with (
        only_process_in(tmp_path),
        caplog.at_level("INFO", "babel"),
        pytest.raises(BadInput, match=rf"another process is at work in it \(process {os.getpid()}\)"),
        alone_in(tmp_path, wait=True),
    ):
        pass
    assert 360 < now[0] < 363
    said = [record.message for record in caplog.records]
    assert len(said) == 7
    assert said[3].endswith("(waiting, 3 minutes so far)")
    assert str(os.getpid()) in said[0]
