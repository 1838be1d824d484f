import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from babel_jax.digests import read_sums
from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.layout import tensor_shapes
from babel_jax.model_folders.orbax_params import LeafFiles
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.model_folders.safetensors_files import TensorFiles
from babel_jax.model_folders.transfer import convert
from babel_jax.new_folders import resumable_folder

# Once ready, converts again and again under new names until it is killed.
CONVERT_FOREVER = """
import itertools, sys
from babel_jax.model_folders.transfer import convert
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
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def large_config(tiny_config):
    return tiny_config.model_copy(update={"vocab_size": 8000})


@pytest.mark.parametrize("format", Format)
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path, small_disk, write_model, large_config, format, capfd
):
    source = open_folder(write_model(tmp_path / "source", large_config))
    with pytest.raises(BadInput, match="no space left") as raised:
        save_folder(small_disk / "out", format, load_params(source), source.hf_config)
    assert str(small_disk / "out") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [60, 90, 120, 150])
def test_a_disk_that_is_full_before_the_first_tensor_is_not_taken_for_damage(
    tmp_path, small_disk, write_model, kilobytes
):
    source = write_model(tmp_path / "source")
    (small_disk / "other").write_bytes(b"x" * (256 - kilobytes) * 1024)
    with pytest.raises(BadInput, match="no space left"):
        convert(source, small_disk / "out")
    (small_disk / "other").unlink()
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_while_the_other_files_are_copied(tmp_path, small_disk, write_model):
    source = write_model(tmp_path / "source")
    (source / "tokenizer.txt").write_bytes(b"x" * 300_000)
    with pytest.raises(BadInput, match="no space left"):
        convert(source, small_disk / "out")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("format", Format)
def test_killed_at_any_moment_nothing_half_written_has_a_final_name(
    tmp_path, write_model, read_bits, large_config, format
):
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
        # The working directory of pytest need not be the repository; the package is found where this process
        # found it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.1))
        # Most of the time goes into reading, when there is nothing to spoil.
        while not any(out.glob("*.partial")):
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


def stopped_and_resumed(monkeypatch, sink, method, error, write_folder, out):
    """Writes `out` twice. The first time, the tenth call of the sink's method raises `error`. Gives the names
    of the tensors that were written, of both times together.
    """
    monkeypatch.setattr("babel_jax.model_folders.streaming._BYTES_BETWEEN_SYNCS", 1)
    written = []

    def fail_at_tenth(self, name, start, values, write=getattr(sink, method)):
        written.append(name)
        if len(written) == 10:
            raise error
        write(self, name, start, values)

    monkeypatch.setattr(sink, method, fail_at_tenth)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else BadInput):
        write_folder()
    assert not out.exists()
    assert out.with_name(f"{out.name}.partial").is_dir()
    write_folder()
    return written[:9] + written[10:]


STOPS = pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])


@pytest.mark.parametrize("format", Format)
@STOPS
def test_stopped_midway_the_same_command_goes_on(
    tmp_path, write_model, read_bits, monkeypatch, error, format
):
    """Tensors that were noted as done are not written again."""
    source, out = write_model(tmp_path / "hf"), tmp_path / "out"
    bits = read_bits(source)
    if format is Format.HF:
        convert(source, tmp_path / "orbax")
        source = tmp_path / "orbax"
    sink = TensorFiles if format is Format.HF else LeafFiles
    written = stopped_and_resumed(monkeypatch, sink, "write", error, lambda: convert(source, out), out)
    assert written == list(tensor_shapes(open_folder(source).config))
    assert not (tmp_path / "out.partial").exists()
    assert bits_of(out, tmp_path / "again", read_bits) == bits


@STOPS
def test_a_copy_stopped_midway_goes_on_and_its_list_of_digests_is_right(
    tmp_path, write_model, read_bits, monkeypatch, error
):
    """Digests are computed while the bytes are written, and the second call writes a part of them alone."""
    source, out = write_model(tmp_path / "hf"), tmp_path / "out"

    def copy():
        convert(source, out, Format.HF, share=False)

    written = stopped_and_resumed(monkeypatch, TensorFiles, "write_blocks", error, copy, out)
    assert written == list(tensor_shapes(open_folder(source).config))
    assert read_bits(out) == read_bits(source)
    listed = read_sums(out / "SHA256SUMS")
    assert listed == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in listed}
    assert len(listed) == len(list(out.iterdir())) - 1


def test_what_was_begun_for_another_source_or_cut_in_its_list_does_not_count(
    tmp_path, write_model, read_bits, monkeypatch
):
    source = write_model(tmp_path / "source")
    monkeypatch.setattr("babel_jax.model_folders.streaming._BYTES_BETWEEN_SYNCS", 1)
    partial = tmp_path / "out.partial"

    def stop(self, write_all=LeafFiles.close):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeafFiles, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    lines = (partial / "progress.jsonl").read_text().splitlines()
    (partial / "progress.jsonl").write_text("\n".join(lines[:-3]) + "\nmodel.layers.2.ml")
    convert(source, tmp_path / "out")
    assert bits_of(tmp_path / "out", tmp_path / "again", read_bits) == read_bits(source)

    shutil.rmtree(tmp_path / "out")
    partial.mkdir()
    (partial / "progress.jsonl").write_text("\n".join(["of another source", *lines[1:]]) + "\n")
    (partial / "stale").write_text("stale")
    convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()
    assert bits_of(tmp_path / "out", tmp_path / "twice", read_bits) == read_bits(source)


def test_a_source_that_changes_while_it_is_read_is_named(tmp_path, write_model, monkeypatch):
    source = write_model(tmp_path / "source")

    def touch(self, close=LeafFiles.close):
        os.utime(source / "model-00001-of-00002.safetensors", (1, 1))
        close(self)

    monkeypatch.setattr(LeafFiles, "close", touch)
    with pytest.raises(BadInput, match=r"source: model-00001-of-00002.safetensors changed while it was read"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_two_processes_at_one_output(tmp_path, write_model):
    source = write_model(tmp_path / "source")
    with (
        resumable_folder(tmp_path / "out", "mine"),
        pytest.raises(BadInput, match="another process is at work in it"),
    ):
        convert(source, tmp_path / "out")


def test_verify_finds_a_bit_that_changed_on_the_way(tmp_path, write_model, monkeypatch):
    source = write_model(tmp_path / "source")
    assert convert(source, tmp_path / "good", verify=True)["verified"]["tensors"] == len(
        tensor_shapes(open_folder(source).config)
    )

    def flip(self, name, start, values, write=LeafFiles.write):
        if name == "model.norm.weight":
            values = values.copy()
            values.view(np.uint16)[3] ^= 1
        write(self, name, start, values)

    monkeypatch.setattr(LeafFiles, "write", flip)
    with pytest.raises(BadInput, match=r"1 tensors read back differ from their source \(model.norm.weight\)"):
        convert(source, tmp_path / "bad", verify=True)
    assert not (tmp_path / "bad").exists()


def test_a_flipped_bit_on_disk_is_found_when_read(tmp_path, write_model, large_config):
    convert(write_model(tmp_path / "source", large_config), tmp_path / "orbax")
    largest = max((tmp_path / "orbax" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(BadInput, match="damaged Orbax parameters"):
        convert(tmp_path / "orbax", tmp_path / "out")
    with pytest.raises(BadInput, match="damaged Orbax parameters"):
        load_params(open_folder(tmp_path / "orbax"))


def test_too_little_memory_is_refused(tmp_path, write_model):
    with pytest.raises(BadInput, match=r"--memory-limit 0.50 GiB is too little; give at least 1.03"):
        convert(write_model(tmp_path / "source"), tmp_path / "out", memory_limit=2**29)


@pytest.mark.parametrize("format", Format)
def test_what_does_not_read_back_is_written_again_and_the_rest_is_kept(
    tmp_path, write_model, read_bits, monkeypatch, format
):
    source = write_model(tmp_path / "hf")
    bits = read_bits(source)
    if format is Format.HF:
        convert(source, tmp_path / "orbax")
        source = tmp_path / "orbax"
    sink, written = TensorFiles if format is Format.HF else LeafFiles, []

    def flip_first(self, name, start, values, write=sink.write):
        if name == "model.norm.weight" and name not in written:
            values = values.copy()
            values.view(np.uint16)[3] ^= 1
        written.append(name)
        write(self, name, start, values)

    monkeypatch.setattr(sink, "write", flip_first)
    with pytest.raises(
        BadInput, match=r"1 tensors read back differ .*run the command again: it writes these anew"
    ):
        convert(source, tmp_path / "out", verify=True, shard_bytes=3000)
    assert (tmp_path / "out.partial").is_dir()
    first = len(written)
    convert(source, tmp_path / "out", verify=True, shard_bytes=3000)
    assert "model.norm.weight" in written[first:]
    assert len(written) - first < first
    assert bits_of(tmp_path / "out", tmp_path / "again", read_bits) == bits


def test_the_list_of_files_has_no_leftover_of_itself(tmp_path, write_model, read_bits, monkeypatch):
    """Killed while the list was written, the next run listed what was left, and then missed it."""
    source = write_model(tmp_path / "source")
    real = LeafFiles.close

    def leave(self):
        for name in ("files.json", "files.json.partial", ".files.json.0123456789abcdef.partial"):
            (self._path / name).write_text("{")
        real(self)

    monkeypatch.setattr(LeafFiles, "close", leave)
    convert(source, tmp_path / "orbax", verify=True)
    listed = json.loads((tmp_path / "orbax" / "params" / "files.json").read_text())
    assert not [name for name in listed if "files.json" in name]
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == read_bits(source)
