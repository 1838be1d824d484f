"""The same scores on one device, on eight, and on two processes with two devices each."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from babel_jax.evaluation.benchmarks.evaluate import Request, evaluate
from tests.forced_devices import forced_devices

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 2)])
def test_scores_do_not_depend_on_devices_and_processes(processes, devices, tiny_folder, benchmarks, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = forced_devices(devices)
    script = Path(__file__).with_name("many_devices.py")
    started = [
        subprocess.Popen(
            [
                sys.executable,
                script,
                str(process),
                str(processes),
                str(port),
                tiny_folder(),
                benchmarks,
                tmp_path,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(
        errors[-3000:] for _, errors in ended
    )
    request = Request(tasks=("xcopa", "xnli", "flores200"), data=benchmarks, few_shot=1, limit=2)
    expected = evaluate(str(tiny_folder()), [], request)["tasks"]
    for output, _ in ended:
        seen = json.loads(
            next(line for line in output.splitlines() if line.startswith("SEEN ")).removeprefix("SEEN ")
        )
        assert seen["devices"] == processes * devices
        for task, by_language in expected.items():
            for code, score in by_language.items():
                assert seen["tasks"][task][code] == pytest.approx(score, abs=1e-6), task
        assert seen["again"] == seen["tasks"]
