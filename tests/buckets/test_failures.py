"""A bucket that fails in the middle of a run, its leases, and what of a run is in it besides."""

import json
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from babel_jax import cli
from babel_jax.buckets import filesystem, kvstore
from babel_jax.errors import BadInput
from babel_jax.lease import NAME, leased
from babel_jax.places import listing, place, pull
from babel_jax.recipe.claim import claim
from babel_jax.recipe.recipe import run_recipe
from babel_jax.run_files import is_beside_checkpoints
from babel_jax.sending import check_access, is_taken
from babel_jax.training.compilation import compiled_in
from babel_jax.training.run_state import newest_step
from tests.buckets.gcs_server import Fault, Stored
from tests.buckets.test_run import check_same

PARTS = (
    "metrics.jsonl",
    "checkpoints/2/default/ocdbt",
    "checkpoints/2/_CHECKPOINT_METADATA",
    "checkpoints/4/default/SHA256SUMS",
    "hf/model",
)


@pytest.mark.parametrize(
    "parts", [PARTS[1::3], pytest.param(PARTS, marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_rights_that_end_in_the_middle_of_a_run(gcs, config_in, on_disk, tmp_path, capsys, anew, parts):
    """One line wherever it happens, and once the rights are back the same command goes on."""
    config = config_in(gcs, "gs://bucket")
    config.save(tmp_path / "run.toml")
    for part in parts:
        gcs.fault = lambda method, path, part=part: (
            Fault(status=403) if method != "GET" and f"run/{part}" in path else None
        )
        assert cli.main(["train", str(tmp_path / "run.toml")]) == 2, part
        told = capsys.readouterr().err
        lines = [line for line in told.splitlines() if line.startswith("babel: ")]
        assert len(lines) == 1, told
        assert lines[0].startswith("babel: gs://bucket/run"), told
        assert "cannot be written" in lines[0], told
        assert "Traceback" not in told
        gcs.fault = lambda method, path: None
        anew()
    check_same(gcs, run_recipe(config), on_disk)


@pytest.mark.parametrize("name", ["../../evil", "a/../../../evil", "/EVIL/evil", "a//b", "./a", "a/\0"])
def test_a_name_that_leads_out_of_the_folder(gcs, scratch, tmp_path, name):
    """Buckets allow such names; copied as they are, the files would be written anywhere on the disk."""
    name = name.replace("EVIL", str(tmp_path))
    gcs.buckets["bucket"]["run/summary.json"] = Stored(b"{}", 1)
    gcs.buckets["bucket"][f"run/{name}"] = Stored(b"evil", 2)
    with pytest.raises(BadInput, match="which no folder on disk can have; rename or remove it"):
        pull(place("gs://bucket/run"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


@pytest.mark.parametrize("change", [{"md5Hash": "a"}, {"md5Hash": "é"}, {"size": "many"}, {"size": [1]}])
def test_a_listing_with_values_of_other_types(gcs, scratch, change):
    gcs.listed_as = change
    gcs.buckets["bucket"]["run/summary.json"] = Stored(b"{}", 1)
    with pytest.raises(BadInput, match=r"gs://bucket/run: cannot be read"):
        pull(place("gs://bucket/run"))


def test_a_bucket_that_shows_an_older_state_is_refused(gcs, scratch):
    gcs.fault = lambda method, path: (
        Fault(status=404) if method == "GET" and "babel-probe" in path and "prefix" not in path else None
    )
    with pytest.raises(BadInput, match=r"gs://bucket/run: what was just written is not what is read back"):
        check_access(place("gs://bucket/run"))
    assert gcs.names("bucket") == []


def test_what_a_kill_left_at_the_very_start_is_no_run(gcs, config_in, anew):
    """A probe, and a lease of a job that has ended."""
    gcs.buckets["bucket"]["run/babel-probe-0123456789abcdef"] = Stored(b"1", 10**9)
    folder = place("gs://bucket/run")
    assert listing(folder) == {}
    assert not is_taken(folder)
    pull(folder, is_beside_checkpoints, fresh=True)
    claim(folder, config_in(gcs, "gs://bucket"))
    assert "run/config.toml" in gcs.names("bucket")


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_a_run_folder_in_a_bucket_belongs_to_one_job(kind, request):
    request.getfixturevalue(kind)
    url = {"gcs": "gs://bucket/run", "s3": "s3://bucket/run"}[kind]
    folder, store = place(url), kvstore(url)
    with leased(folder, beat=0.05):
        first = json.loads(store.read(NAME).result().value)
        assert first["process"] == os.getpid()
        with (
            pytest.raises(
                BadInput, match=rf"{url}: another job is at work in it \(process {os.getpid()} on "
            ),
            leased(folder, beat=0.05),
        ):
            pass
    assert store.read(NAME).result().state == "missing"
    # A job of another host that was killed: its lease stands still.
    store.write(
        NAME,
        json.dumps({"holder": "gone", "machine": "another", "host": "far", "process": 1, "beat": 7}).encode(),
    ).result()
    with leased(folder, beat=0.02):
        assert json.loads(store.read(NAME).result().value)["holder"] != "gone"
    # One of this machine whose process has ended is taken at once, and what is no lease too.
    ended = {**first, "holder": "ended", "process": 2**22 + 1}
    for data in (json.dumps(ended).encode(), b"not a lease", b""):
        store.write(NAME, data).result()
        with leased(folder, beat=60):
            assert json.loads(store.read(NAME).result().value)["process"] == os.getpid()


def test_of_jobs_that_begin_together_one_gets_the_folder(gcs):
    folder, outcomes, together = place("gs://bucket/run"), [], threading.Barrier(8)

    def begin():
        together.wait()
        try:
            with leased(folder, beat=0.5):
                outcomes.append("held")
                release.wait()
        except BadInput as refused:
            outcomes.append(str(refused))

    release = threading.Event()
    jobs = [threading.Thread(target=begin) for _ in range(8)]
    for job in jobs:
        job.start()
    # The one that holds it gives no way before all others have been refused.
    for _ in range(3000):
        if len(outcomes) == 8 or release.wait(0.02):
            break
    release.set()
    for job in jobs:
        job.join()
    assert sorted(outcome == "held" for outcome in outcomes) == [False] * 7 + [True], outcomes


def test_compiled_programs_are_in_the_bucket(gcs):
    before = {
        name: jax.config.values[name]
        for name in ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    }
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        kept = []
        for _ in range(2):
            with compiled_in(place("gs://bucket/run") / "compiled"):
                jax.jit(lambda x: jnp.tanh(x) @ x + 17)(jnp.ones((9, 9))).block_until_ready()
            kept.append(
                {
                    name: stored.generation
                    for name, stored in gcs.buckets["bucket"].items()
                    if name.endswith("-cache")
                }
            )
            jax.clear_caches()
        # The second time the programs were there, and none was written again.
        assert any(name.startswith("run/compiled/jit") for name in kept[0])
        assert kept[0].items() <= kept[1].items()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_results_of_an_evaluation_are_in_the_bucket(gcs, base, tmp_path, capsys, anew):
    gcs.put_folder(Path(base["hf"]), "gs://bucket/model")
    arguments = [
        "evaluate",
        "gs://bucket/model",
        "--tasks",
        "bits_per_byte",
        "--languages",
        "en,sw",
        "--max-bytes",
        "500",
        "--json",
    ]
    assert cli.main([*arguments, "--out", "gs://bucket/results"]) == 0
    found = json.loads(capsys.readouterr().out)
    anew()
    assert cli.main(["evaluate", base["hf"], *arguments[2:], "--out", str(tmp_path / "results")]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert found["out"] == "gs://bucket/results"
    assert found["tasks"] == expected["tasks"]
    there = {name.removeprefix("results/") for name in gcs.names("bucket", "results/")}
    assert there == {
        str(path.relative_to(tmp_path / "results"))
        for path in (tmp_path / "results").rglob("*")
        if path.is_file()
    }
    assert json.loads(gcs.read("bucket", "results/evaluation.json"))["tasks"] == expected["tasks"]


def test_a_step_counts_when_its_file_of_success_is_there(gcs):
    for name in (
        "4/default/d/x",
        "4/commit_success.txt",
        "4/default/commit_success.txt",
        "6/default/commit_success.txt",
        "6/default/d/x",
    ):
        gcs.buckets["bucket"][f"run/checkpoints/{name}"] = Stored(b"1", 1)
    assert newest_step(place("gs://bucket/run") / "checkpoints") == 4
    assert newest_step(place("gs://bucket/other") / "checkpoints") == 0


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\r\n\r\n--x", b""])
def test_the_server_keeps_every_byte(gcs, end):
    """Its multipart uploads once lost a byte of files that end with a line end: a file in 256."""
    files = filesystem("gs://bucket/bytes")
    files.pipe_file("bucket/bytes", b"\r\n\r\nx" + end)
    assert files.cat_file("bucket/bytes") == b"\r\n\r\nx" + end
