"""Model folders and prepared data in a bucket: both formats, read and written; what is not whole, and what
may not be read or written.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load, load_file

from babel_jax import cli, lease
from babel_jax.buckets import clean, kvstore, stored_below, without_secrets
from babel_jax.config import CleaningSettings, DeduplicationSettings, Rule
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.data.windows.storage import open_windows
from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.transfer import convert
from babel_jax.places import place, url_of
from babel_jax.sending import UNFINISHED
from tests.buckets.gcs_server import Fault

SERVERS = pytest.mark.parametrize("kind", ["gcs", "s3"])
URLS = {"gcs": "gs://bucket", "s3": "s3://bucket"}


def same_tree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all(), one, other)
    )


@SERVERS
def test_both_formats_are_written_and_read(kind, request, base, anew, tmp_path):
    server, url, source = request.getfixturevalue(kind), URLS[kind], Path(base["hf"])
    expected = load_params(open_folder(source))
    convert(source, f"{url}/orbax")
    anew()
    orbax = open_folder(f"{url}/orbax")
    assert orbax.format is Format.ORBAX
    same_tree(load_params(orbax), expected)
    convert(f"{url}/orbax", f"{url}/hf", verify=kind == "gcs")
    anew()
    same_tree(load_params(open_folder(f"{url}/hf")), expected)
    written, wanted = (
        load(server.read("bucket", "hf/model.safetensors")),
        load_file(source / "model.safetensors"),
    )
    assert all((written[name] == wanted[name]).all() for name in wanted)
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert set(server.names("bucket", "hf/")) == {f"hf/{name}" for name in names}
    assert cli.main(["verify", f"{url}/hf"]) == 0
    with pytest.raises(BadInput, match=rf"{url}/hf: exists already"):
        convert(source, f"{url}/hf")


def test_a_folder_is_not_whole_before_its_last_file(gcs, base, anew):
    """At every request that writes, the bucket either has no folder, or one that readers here and elsewhere
    refuse, or the whole one.
    """
    source, states = Path(base["hf"]), []

    def look(method, path):
        if method != "GET":
            names = set(gcs.names("bucket", "new/")) - {f"new/{lease.NAME}"}
            if path.endswith(lease.NAME) or lease.NAME in path:
                return
            states.append((f"new/{UNFINISHED}" in names, "new/config.json" in names, len(names)))

    gcs.fault = look
    convert(source, "gs://bucket/new", Format.HF)
    gcs.fault = lambda method, path: None
    whole = len(gcs.names("bucket", "new/"))
    for unfinished, has_config, number in states:
        assert unfinished or number <= 1, states  # the probe of the rights
        assert not has_config or number == whole + 1
    anew()
    stopped = dict(gcs.buckets["bucket"])

    for missing in ("new/config.json", "new/model.safetensors"):  # as a kill leaves it
        gcs.buckets["bucket"] = {name: stored for name, stored in stopped.items() if name != missing}
        gcs.buckets["bucket"][f"new/{UNFINISHED}"] = stopped["new/config.json"]
        with pytest.raises(
            BadInput, match=r"gs://bucket/new: not whole: a command is writing it, or was killed as it did"
        ):
            open_folder("gs://bucket/new")
        assert cli.main(["generate", "gs://bucket/new", "x"]) == 2
        anew()
        convert(source, "gs://bucket/new", Format.HF)
        assert {name: stored.data for name, stored in gcs.buckets["bucket"].items()} == {
            name: stored.data for name, stored in stopped.items()
        }
        anew()


def test_a_conversion_that_was_stopped_goes_on(gcs, base, anew, scratch, monkeypatch):
    """The bucket fails in the middle of the upload: the command ends in one line, and the next one sends only
    what is missing.
    """
    sent = []

    def refuse(method, path):
        if "/upload/" in path:
            sent.append(path)
            if "tokenizer.model" in path:
                return Fault(status=403)
        return None

    gcs.fault = refuse
    with pytest.raises(BadInput, match=r"gs://bucket/new/tokenizer.model: cannot be written \("):
        convert(base["hf"], "gs://bucket/new", Format.HF)
    assert f"new/{UNFINISHED}" in gcs.names("bucket")
    gcs.fault = lambda method, path: None
    anew()
    convert(base["hf"], "gs://bucket/new", Format.HF)
    assert cli.main(["verify", "gs://bucket/new"]) == 0


@SERVERS
def test_of_two_machines_that_write_one_folder_one_is_refused(
    kind, request, base, anew, tmp_path, capsys, monkeypatch
):
    """The other one's lease is written by hand: it gives signs of life, then it stops."""
    request.getfixturevalue(kind)
    monkeypatch.setattr(lease.leased.__wrapped__, "__defaults__", (0.1,))
    url = {"gcs": "gs://bucket/copy", "s3": "s3://bucket/copy"}[kind]
    store, ended = kvstore(url), threading.Event()

    def live():
        beat = 0
        while not ended.is_set():
            of_other = {"holder": "other", "machine": "another", "host": "far", "process": 1, "beat": beat}
            store.write(lease.NAME, json.dumps(of_other).encode()).result()
            beat += 1
            ended.wait(0.02)

    other = threading.Thread(target=live)
    other.start()
    try:
        assert cli.main(["convert", base["hf"], url]) == 2
    finally:
        ended.set()
        other.join()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("babel: ")]
    assert len(told) == 1
    assert told[0].startswith(f"babel: {url}: another job is at work in it (process 1 on far)")
    assert set(stored_below(url)) <= {"babel-unfinished.json"}
    # Killed: after some silence another machine may.
    assert cli.main(["convert", base["hf"], url]) == 0
    assert store.read(lease.NAME).result().state == "missing"
    anew()
    assert cli.main(["convert", base["hf"], url]) == 2
    assert "exists already" in capsys.readouterr().err
    open_folder(url)


@pytest.mark.slow
@SERVERS
def test_two_machines_that_convert_to_one_folder_at_once(kind, request, base, tmp_path):
    """Two processes with scratch spaces of their own: each knows the other by the bucket alone."""
    server = request.getfixturevalue(kind)
    url = {"gcs": "gs://bucket/copy", "s3": "s3://bucket/copy"}[kind]
    started = []
    for number in range(2):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "BABEL_SCRATCH": str(tmp_path / f"scratch-{number}"),
        }
        command = [sys.executable, "-m", "babel_jax.cli", "convert", base["hf"], url]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2], said
    refused = said[[process.returncode for process in started].index(2)]
    (line,) = [line for line in refused.splitlines() if line.startswith("babel: ")]
    words = ("another job is at work in it", "another job has just begun in it", "exists already")
    assert any(one in line for one in words)
    left = [name for name in server.names("bucket", "copy/") if UNFINISHED in name or lease.NAME in name]
    assert not left
    same_tree(load_params(open_folder(url)), load_params(open_folder(base["hf"])))


def test_prepared_data_is_the_same_from_every_machine(
    gcs, small_settings, small_prepared, small_model, anew, scratch, monkeypatch
):
    settings = small_settings.model_copy(update={"folder": "gs://bucket/data"})
    report = prepare(settings, small_model)
    assert report == prepare(small_settings, small_model)
    digests = gcs.read("bucket", "data/windows/en-web/SHA256SUMS")
    assert digests == (Path(small_prepared) / "windows" / "en-web" / "SHA256SUMS").read_bytes()

    anew()
    monkeypatch.setenv("BABEL_SCRATCH", str(scratch / "of another machine"))
    gcs.requests.clear()
    assert prepare(settings, small_model) == report
    assert not gcs.requests["POST"]
    prepared = open_prepared("gs://bucket/data")
    assert prepared.heldout("en") == open_prepared(small_prepared).heldout("en")
    here = place("gs://bucket/data") / "windows"
    assert not list(here.rglob("*array_record*"))
    windows = open_windows(here / "en-web")
    expected = open_windows(Path(small_prepared) / "windows" / "en-web")
    assert len(windows) == len(expected)
    assert all(
        (windows[number]["tokens"] == expected[number]["tokens"]).all() for number in range(len(windows))
    )
    assert [path.parts[-3] for path in here.rglob("*array_record*")] == ["en-web"]

    anew()  # the same machine again: nothing is fetched twice
    before = gcs.bytes["sent"]
    open_windows(place("gs://bucket/data") / "windows" / "en-web")
    assert gcs.bytes["sent"] - before < 20_000

    anew()  # a copy here that was changed, and one in the bucket
    file = next(path for path in here.rglob("*array_record*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    open_windows(place("gs://bucket/data") / "windows" / "en-web")
    assert file.read_bytes() == gcs.read("bucket", f"data/windows/en-web/1.0.0/{file.name}")
    anew()
    name = f"data/windows/en-web/1.0.0/{file.name}"
    data = gcs.read("bucket", name)
    gcs.buckets["bucket"][name].data, gcs.buckets["bucket"][name].generation = data[:-1] + b"x", 10**9
    with pytest.raises(
        BadInput, match=rf"gs://bucket/{name}: not the bytes that were written; prepare the folder again"
    ):
        open_windows(place("gs://bucket/data") / "windows" / "en-web")
    with pytest.raises(BadInput, match=r"gs://bucket/data: prepared with another seq_len"):
        prepare(settings.model_copy(update={"seq_len": 32}), small_model)


def test_a_scratch_disk_without_room(gcs, small_settings, small_model, anew, scratch, monkeypatch):
    prepare(small_settings.model_copy(update={"folder": "gs://bucket/data"}), small_model)
    anew()
    monkeypatch.setenv("BABEL_SCRATCH", str(scratch / "other"))
    monkeypatch.setattr("babel_jax.places.FREE_BYTES", 2**60)
    with pytest.raises(
        BadInput,
        match=r"gs://bucket/data: [\d,]+ bytes are to be copied to the scratch space, .*set BABEL_SCRATCH",
    ):
        open_prepared("gs://bucket/data")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://", "no folder of a bucket; write gs://BUCKET/FOLDER"),
        ("gs://bucket", "names no folder in the bucket; write gs://bucket/FOLDER"),
        ("gs://bucket/", "names no folder in the bucket"),
        ("gs://bucket/a/../b", "names no folder in the bucket"),
        ("s3://KEY:SECRET@bucket/x", "s3://bucket/x: no folder of a bucket"),
        ("https://bucket.s3.amazonaws.com/x?X-Amz-Signature=SECRET", "no folder of a bucket"),
    ],
)
def test_urls_that_name_no_folder(url, message, scratch):
    with pytest.raises(BadInput, match=message.replace("?", r"\?")) as raised:
        place(url)
    assert "SECRET" not in str(raised.value)
    assert "KEY" not in str(raised.value)


def test_urls_in_one_form(scratch):
    assert clean("gs://bucket//a/b//") == "gs://bucket/a/b"
    assert place("gs://bucket/a/") == place("gs://bucket/a")
    assert url_of(place("gs://bucket/a") / "b" / "c") == "gs://bucket/a/b/c"
    assert url_of(place("gs://bucket/a") / "b.partial" / "c") is None
    assert url_of(Path("/a")) is None
    assert without_secrets("https://me:pw@host/a?token=x#y") == "https://host/a"


def run_in(tmp_path, config, **changes):
    values = config.model_dump(mode="json", exclude_none=True)
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            values[part][key] = value
        else:
            values[part] = value
    config.model_validate_json(json.dumps(values)).save(tmp_path / "run.toml")
    return cli.main(["train", str(tmp_path / "run.toml")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"out": "gs://nowhere/run"},
            "gs://nowhere/run: there is no bucket nowhere, or it is not yours to see",
        ),
        ({"out": "gs://locked/run"}, "gs://locked/run: cannot be written (Forbidden"),
        ({"out": "gs://hidden/run"}, "gs://hidden/run: cannot be read (Forbidden"),
        (
            {"out": "memory://bucket/run"},
            "memory://bucket/run: files can be written to gs:// and s3:// alone",
        ),
        (
            {"out": "nosuch://bucket/run"},
            "nosuch://bucket/run: files can be written to gs:// and s3:// alone",
        ),
        ({"data__folder": "gs://nowhere/data"}, "gs://nowhere/data: there is no bucket nowhere"),
        ({"data__folder": "gs://locked/data"}, "gs://locked/data: cannot be written (Forbidden"),
        (
            {"data__folder": "gs://bucket/data", "data__sources": []},
            "gs://bucket/data: is no folder of prepared data",
        ),
        ({"model__folder": "gs://nowhere/model"}, "gs://nowhere/model: no such model folder"),
        ({"model__folder": "gs://hidden/model"}, "gs://hidden/model: cannot be read (Forbidden"),
        ({"out": "gs://bucket/models"}, "gs://bucket/models: not empty and not a run folder"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_at_once(gcs, config_in, tmp_path, capsys, changes, message):
    config = config_in(gcs, "gs://bucket")
    gcs.buckets |= {"locked": {}, "hidden": {}}
    gcs.unwritable.add("locked")
    gcs.unreadable.add("hidden")
    start = time.monotonic()
    assert run_in(tmp_path, config, **changes) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("babel: ")] == [told[-1]]
    assert told[-1].startswith(f"babel: {message}"), told[-1]
    assert time.monotonic() - start < 10
    assert not [name for name in gcs.names("bucket") if name.startswith("run/") and name != "run/config.toml"]


@pytest.mark.parametrize(
    ("fault", "out", "message"),
    [
        (None, "s3://nowhere/run", "s3://nowhere/run: there is no bucket nowhere, or it is not yours to see"),
        ("PUT", "s3://bucket/run", "s3://bucket/run: cannot be written"),
        ("GET", "s3://bucket/run", "s3://bucket/run: cannot be read"),
        ("DELETE", "s3://bucket/run", "s3://bucket/run/babel-probe-"),
    ],
)
def test_a_bucket_of_s3_that_cannot_be_used(s3, config_in, tmp_path, capsys, fault, out, message):
    config = config_in(s3, "s3://bucket")
    s3.fault = lambda method, path: 403 if method == fault else None
    assert run_in(tmp_path, config, out=out) == 2
    s3.fault = lambda method, path: None
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("babel: ")]
    assert len(told) == 1
    assert told[0].startswith(f"babel: {message}"), told
    assert not [name for name in s3.names("bucket", "run/") if "babel-probe" not in name]


def test_no_key_is_told(s3, config_in, tmp_path, capsys, monkeypatch):
    config = config_in(s3, "s3://bucket")
    s3.fault = lambda method, path: 403
    assert run_in(tmp_path, config) == 2
    told = capsys.readouterr().err
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in told
    assert "s3://bucket/run: cannot be " in told


def test_commands_whose_folder_must_be_on_disk(capsys, scratch):
    for arguments in (
        ["demo", "--out", "gs://bucket/demo"],
        ["ablate", "gs://bucket/model", "--out", "gs://bucket/study"],
        [
            "judge",
            str(Path(__file__).parents[2] / "configs" / "quality.toml"),
            "--set",
            "out=gs://bucket/quality",
        ],
    ):
        assert cli.main(arguments) == 2
        assert "must be a folder on disk" in capsys.readouterr().err
    assert not Path("gs:").exists()


def test_a_tokenizer_in_a_bucket_is_the_one_on_disk(gcs, base):
    gcs.put_folder(Path(base["hf"]), "gs://bucket/model")
    gcs.log.clear()
    assert open_tokenizer("gs://bucket/model").fingerprint == open_tokenizer(base["hf"]).fingerprint
    assert not [path for _, path, _, _ in gcs.log if "safetensors" in path]
    with pytest.raises(
        BadInput, match=r"gs://bucket/other: no such tokenizer|gs://bucket/other: no tokenizer"
    ):
        open_tokenizer("gs://bucket/other")


def test_cleaned_text_and_a_preparation_that_was_stopped(
    gcs, small_settings, small_model, anew, scratch, monkeypatch, tmp_path
):
    cleaning = CleaningSettings(min_characters=20, off=(Rule.REPETITION, Rule.WORDS))
    refined = small_settings.model_copy(
        update={"cleaning": cleaning, "deduplication": DeduplicationSettings(near=False)}
    )
    expected = prepare(refined.model_copy(update={"folder": str(tmp_path / "data")}), small_model)
    settings = refined.model_copy(update={"folder": "gs://bucket/data"})
    gcs.fault = lambda method, path: (
        Fault(status=403) if method == "POST" and "data/heldout/" in path else None
    )
    with pytest.raises(BadInput, match=r"gs://bucket/data/heldout/\w+.jsonl: cannot be written \("):
        prepare(settings, small_model)
    gcs.fault = lambda method, path: None
    assert "data/prepared.json" not in gcs.names("bucket")
    anew()
    with pytest.raises(
        BadInput, match=r"gs://bucket/data: not whole: a command is writing it, or was killed as it did"
    ):
        open_prepared("gs://bucket/data")
    with monkeypatch.context() as changed:  # all is there; nothing is read or tokenized again
        changed.setattr("babel_jax.data.windows.prepare._survey", None)
        assert prepare(settings, small_model) == expected
    anew()
    monkeypatch.setenv("BABEL_SCRATCH", str(scratch / "of another machine"))
    gcs.requests.clear()
    assert prepare(settings, small_model) == expected
    assert not gcs.requests["POST"]
