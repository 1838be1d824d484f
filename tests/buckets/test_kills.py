"""A run in a bucket that is killed (kill -9) at requests of all kinds, and one whose bucket fails now and
then: nothing is lost.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from babel_jax.recipe.recipe import run_recipe
from tests.buckets.gcs_server import Fault
from tests.buckets.test_run import check_same

URLS = {"gcs": "gs://bucket", "s3": "s3://bucket"}
KILLS = {"gcs": 10, "s3": 5}
SERVERS = pytest.mark.parametrize("kind", URLS)


@pytest.mark.slow
@SERVERS
def test_a_run_in_a_bucket_is_killed_many_times(kind, request, config_in, on_disk, tmp_path, scratch):
    server, kills = request.getfixturevalue(kind), KILLS[kind]
    config_in(server, URLS[kind]).save(tmp_path / "run.toml")
    chance, lock, met, found = random.Random(1), threading.Lock(), Counter(), []
    left, victim = 0, 0

    def kill(method, path):
        nonlocal left
        with lock:
            if method == "GET" or not victim or len(found) == kills:
                return
            left -= 1
            if left == 0:
                found.append(path)
                met[path.split("?")[0].split("/")[1]] += 1
                os.kill(victim, signal.SIGKILL)

    server.fault = kill
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("killed_run.py"), tmp_path / "run.toml"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as runner:
        errors = []
        reader = threading.Thread(target=lambda: errors.append(runner.stderr.read()), daemon=True)
        reader.start()
        for line in runner.stdout:
            with lock:
                if line.startswith("status"):
                    assert line.split() == ["status", "0"], errors
                    break
                left, victim = chance.randrange(1, 60), int(line)
        runner.wait()
        reader.join()
    assert line.split() == ["status", "0"], errors
    assert len(found) == kills, found
    server.fault = lambda method, path: None
    result = run_recipe(config_in(server, URLS[kind]))
    check_same(server, result, on_disk)
    # A kill after the last file of the data leaves its lease, which nobody heeds any more.
    left = ("babel-unfinished", "probe", "run/lease.json")
    assert not [name for name in server.names("bucket") if any(part in name for part in left)]


@pytest.mark.slow
@SERVERS
def test_a_bucket_that_fails_now_and_then_changes_nothing(kind, request, config_in, on_disk):
    server = request.getfixturevalue(kind)
    chance, met = random.Random(2), Counter()
    kinds = {
        "unavailable": Fault(status=503),
        "too many": Fault(status=429),
        "slow": Fault(seconds=0.3),
        "cut": Fault(cut=True),
    }

    def fault(method, path):
        if chance.random() < 0.03:
            kind = chance.choice(list(kinds))
            met[kind] += 1
            return kinds[kind]
        return None

    server.fault = fault
    result = run_recipe(config_in(server, URLS[kind]))
    server.fault = lambda method, path: None
    assert all(met[kind] > 2 for kind in kinds), met
    check_same(server, result, on_disk)
