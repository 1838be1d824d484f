"""SIGTERM to `babel prepare` in real processes, whatever runs its tasks: status 0, in time, and the same
command goes on.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.refining.test_refinement import files_of, varied

MOST_SECONDS = 30.0  # what a preemptible machine has between SIGTERM and its end


@pytest.fixture
def prepare_command(tmp_path, small_model):
    """The command that prepares one text into a folder: (folder's name, engine)."""
    rows = [{"id": str(number), "text": text} for number, text in enumerate(varied("sw", 100))]
    (tmp_path / "sw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(name, engine):
        config = tmp_path / f"{name}.toml"
        config.write_text(
            f'out = "{tmp_path}/run"\n[model]\nfolder = "none"\n'
            f'[data]\nfolder = "{tmp_path / name}"\ntokenizer = "{small_model}"\nseq_len = 64\nengine = '
            f'"{engine}"\nworkers = 2\n'
            'shard_documents = 10\n[data.cleaning]\nmin_characters = 20\noff = ["repetition", "words"]\n'
            f'[[data.sources]]\nlanguage = "sw"\npath = "{tmp_path}/sw.jsonl"\n'
        )
        return [sys.executable, "-m", "babel_jax.cli", "prepare", str(config)]

    return command


def stopped(command, ready):
    """Sends SIGTERM to a command when it is ready, by its process id; gives the seconds until its end, its
    status, and what it wrote.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not ready(process.pid) and process.poll() is None:
        time.sleep(0.02)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    return time.monotonic() - sent, process.returncode, out, err


@pytest.mark.slow
def test_sigterm_to_prepare(prepare_command, tmp_path):
    subprocess.run(prepare_command("whole", "local"), check=True, capture_output=True, timeout=120)
    command = prepare_command("stopped", "local")
    seconds, status, out, err = stopped(
        command, lambda _: list(tmp_path.glob("stopped/cleaned/sw/*.parquet"))
    )
    assert (status, out) == (0, "stopped by SIGTERM; the same command resumes\n"), err
    assert "Traceback" not in err
    assert seconds < MOST_SECONDS
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stopped/cleaned/sw/*.parquet")}
    assert done
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_while_ray_starts(prepare_command, tmp_path):
    """Ray has its own handler then, which ends the process with status 15 and leaves Ray's servers alone."""
    pytest.importorskip("ray")
    servers = []

    def starts(process):
        children = subprocess.run(
            ["ps", "-o", "pid,comm", "--ppid", str(process)], capture_output=True, text=True
        ).stdout.splitlines()
        servers.extend(int(line.split()[0]) for line in children if "gcs_server" in line)
        return servers

    _, status, out, err = stopped(prepare_command("stopped", "ray"), starts)
    assert (status, out) == (0, "stopped by SIGTERM; the same command resumes\n"), err
    assert not list(tmp_path.glob("stopped/cleaned/sw/*.parquet"))
    assert not Path("/proc", str(servers[0])).exists()
