import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from babel_jax.checkpoints.folder import Format, convert, load_params, open_folder, save_folder
from babel_jax.errors import BadInput

# Once ready, converts again and again under new names until it is killed.
CONVERT_FOREVER = """
import itertools, sys
from babel_jax.checkpoints.folder import convert
source, out = sys.argv[1:]
convert(source, out + "/warm")
print("ready", flush=True)
for number in itertools.count():
    convert(source, f"{out}/{number}", shard_bytes=3000)
"""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 256 kB."""
    place = tmp_path_factory.mktemp("small_disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def large_config(tiny_config):
    return tiny_config.model_copy(update={"vocab_size": 8000})


@pytest.mark.parametrize("format", Format)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, small_disk, write_model, large_config, format, capfd):
    source = open_folder(write_model(tmp_path / "source", large_config))
    with pytest.raises(BadInput, match="no space left") as raised:
        save_folder(small_disk / "out", format, load_params(source), source.hf_config)
    assert str(small_disk / "out") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_while_the_other_files_are_copied(tmp_path, small_disk, write_model):
    source = write_model(tmp_path / "source")
    (source / "tokenizer.txt").write_bytes(b"x" * 300_000)
    with pytest.raises(BadInput, match="no space left"):
        convert(source, small_disk / "out")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("format", Format)
def test_killed_at_any_moment_nothing_half_written_has_a_final_name(tmp_path, write_model, read_bits, large_config, format):
    source = write_model(tmp_path / "source", large_config)
    bits = read_bits(source)
    if format is Format.HF:
        convert(source, tmp_path / "orbax")
        source = tmp_path / "orbax"
    moments = random.Random(0)
    interrupted = 0
    for attempt in range(10):
        if attempt >= 3 and interrupted:
            break
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, "-c", CONVERT_FOREVER, str(source), str(out)]
        # The working directory of pytest need not be the repository; the package is found where this process found it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.1))
        while not any(out.glob("*.partial")):  # most of the time goes into reading, when there is nothing to spoil
            pass
        time.sleep(moments.uniform(0.0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished = [folder for folder in out.iterdir() if not folder.name.endswith(".partial")]
        assert finished
        for folder in finished:
            assert bits_of(folder, tmp_path / "again" / f"{attempt}-{folder.name}", read_bits) == bits
        for partial in out.glob("*.partial"):
            interrupted += 1
            name = partial.name.removesuffix(".partial")
            convert(source, out / name)
            assert not partial.exists()
            assert bits_of(out / name, tmp_path / "again" / f"{attempt}-{name}-second", read_bits) == bits
    assert interrupted


def bits_of(folder: Path, scratch: Path, read_bits):
    if open_folder(folder).format is Format.HF:
        return read_bits(folder)
    convert(folder, scratch)
    return read_bits(scratch)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing_and_goes_on(tmp_path, write_model, monkeypatch, error):
    source = write_model(tmp_path / "source")

    def interrupt(*_):
        raise error

    monkeypatch.setattr("babel_jax.checkpoints.folder.save_orbax_params", interrupt)
    with pytest.raises(error):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
