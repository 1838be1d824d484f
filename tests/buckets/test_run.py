"""A whole run in a bucket: the same to the bit as on disk."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load, load_file

from babel_jax.errors import BadInput
from babel_jax.places import place
from babel_jax.recipe.integrity import verify_folder
from babel_jax.recipe.recipe import run_recipe
from babel_jax.report.run_report import report_run
from babel_jax.report.run_status import run_status


def check_same(server, result, on_disk):
    run = Path(on_disk["out"])
    assert result["bits_per_byte"] == on_disk["bits_per_byte"]
    lines = [json.loads(line) for line in server.read("bucket", "run/metrics.jsonl").splitlines()]
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["gradient_norm"]) for line in lines] == [
        (line["step"], line["loss"], line["gradient_norm"]) for line in expected
    ]
    written, wanted = (
        load(server.read("bucket", "run/hf/model.safetensors")),
        load_file(run / "hf" / "model.safetensors"),
    )
    assert written.keys() == wanted.keys()
    assert all((written[name] == wanted[name]).all() for name in wanted)
    ours = {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts
    }
    there = {
        name.removeprefix("run/") for name in server.names("bucket", "run/") if "/checkpoints/" not in name
    }
    events = "tensorboard/events"
    assert {name for name in ours if not name.startswith(events)} == {
        name for name in there if not name.startswith(events)
    }
    assert any(name.startswith(events) for name in there)


@pytest.mark.parametrize("kind", ["gcs", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_run_in_a_bucket_is_that_on_disk(kind, request, config_in, on_disk, scratch, anew, monkeypatch):
    server, url = request.getfixturevalue(kind), {"gcs": "gs://bucket", "s3": "s3://bucket"}[kind]
    config = config_in(server, url)
    assert run_status(place(config.out))["summary"] == f"not finished: no step in {url}/run yet"
    result = run_recipe(config, compare_export=True)
    assert (result["out"], result["hf"]) == (f"{url}/run", f"{url}/run/hf")
    assert result["export_difference"] == 0.0
    check_same(server, result, on_disk)
    steps = {name.split("/")[2] for name in server.names("bucket", "run/checkpoints/")}
    assert steps == {"6", "8"}
    for name in server.names("bucket"):  # what is kept there names no folder of this machine
        assert str(scratch).encode() not in server.read("bucket", name), name

    anew()  # as in another process; of the scratch space it uses the windows
    before = dict(server.requests)
    assert run_recipe(config) == result
    # Some two for each file beside the checkpoints.
    assert server.requests["GET"] - before["GET"] < 130
    assert run_status(place(config.out))["summary"] == f"finished: 8 steps in {url}/run"
    page = report_run(place(config.out))["path"]
    assert Path(page).read_bytes() == server.read("bucket", "run/report.html")
    anew()
    monkeypatch.setenv("BABEL_SCRATCH", str(scratch / "of another machine"))
    found = verify_folder(place(config.out))
    assert found["files"] > 20
    assert not [name for name in found["without_digests"] if name.startswith(("hf/", "checkpoints/"))]


def test_a_flipped_bit_in_the_newest_checkpoint_is_found_and_the_one_before_is_used(
    gcs, config_in, on_disk, anew, caplog
):
    config = config_in(gcs, "gs://bucket")
    run_recipe(config)
    anew()
    newest = "run/checkpoints/8/default/ocdbt.process_0/d/"
    damaged = max(gcs.names("bucket", newest), key=lambda name: len(gcs.read("bucket", name)))
    data = gcs.read("bucket", damaged)
    gcs.buckets["bucket"][damaged].data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    for name in [
        *gcs.names("bucket", "run/hf/"),
        "run/summary.json",
        "run/evaluation/continued.json",
        "run/samples.json",
    ]:
        del gcs.buckets["bucket"][name]
    with pytest.raises(
        BadInput,
        match=(
            r"gs://bucket/run: 1 damaged: checkpoints/8/default/ocdbt.process_0/d/.* \(not the bytes that "
            r"were"
        ),
    ):
        verify_folder(place(config.out))
    anew()
    check_same(gcs, run_recipe(config), on_disk)
    assert "checkpoint 8 cannot be read" in caplog.text
    assert "step 6 is taken" in caplog.text
    assert gcs.read("bucket", damaged.replace("checkpoints/8/", "checkpoints/8.damaged/"))
