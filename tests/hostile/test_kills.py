"""Conversions that are killed at their renames, syncs and removals, and two that make one folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

MANY = """
import sys
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.transfer import convert
from babel_jax.errors import BadInput
print("ready", flush=True)
sys.stdin.readline()
made = 0
for number in range(20):
    try:
        convert(sys.argv[1], f"{sys.argv[2]}/{number}", Format.HF, shard_bytes=3000)
        made += 1
    except BadInput:
        pass
print(made)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_killed_at_its_nth_rename_or_sync_a_conversion_loses_nothing(tmp_path, write_model):
    write_model(tmp_path / "source", dtype="float32", shards=1)
    script = Path(__file__).with_name("kills_of_conversion.py")
    # "1", "1" are all of some 350 places, in six minutes.
    command = [
        sys.executable,
        str(script),
        str(tmp_path),
        "17",
        "83",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(kills) == 2
    assert min(kills) >= 2


def test_of_two_processes_at_one_output_one_makes_it(tmp_path, write_model):
    source = write_model(tmp_path / "source", dtype="float32")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MANY, str(source), str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes) for _ in range(2)]
    for one in both:
        assert one.stdout.readline() == "ready\n"
    for one in both:
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sum(int(out) for out, _ in said) == 20
    expected = {
        name: value.tobytes()
        for file in source.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    for folder in (tmp_path / "out").iterdir():
        found = {
            name: value.tobytes()
            for file in folder.glob("*.safetensors")
            for name, value in load_file(file).items()
        }
        assert found == expected
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {str(number) for number in range(20)}
