"""Two processes, each with a disk of its own, whose run is in a bucket: what one process gives."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load, load_file

from babel_jax.places import place
from babel_jax.recipe.integrity import verify_folder
from tests.training.test_processes import train

OVERRIDES = ("training.mesh.fsdp=2", "training.checkpoint_every=4", "evaluation.max_bytes=300")


@pytest.mark.slow
def test_two_processes_share_nothing_but_the_bucket(gcs, config_in, on_disk, tmp_path):
    config_in(gcs, "gs://bucket").save(tmp_path / "run.toml")
    # SIGTERM to process 1 stops both with a checkpoint; the run goes on from there.
    stopped = train(tmp_path / "run.toml", 2, 2, orders="TERM:1:1", overrides=OVERRIDES)
    assert [status for status, *_ in stopped] == [0, 0], "\n".join(errors[-2000:] for *_, errors in stopped)
    assert json.loads(stopped[0][1])["preempted"]
    assert "run/summary.json" not in gcs.names("bucket")
    ended = train(tmp_path / "run.toml", 2, 2, overrides=OVERRIDES)
    assert [status for status, *_ in ended] == [0, 0], "\n".join(errors[-2000:] for *_, errors in ended)
    assert json.loads(ended[0][1])["hf"] == "gs://bucket/run/hf"

    lines = [json.loads(line) for line in gcs.read("bucket", "run/metrics.jsonl").splitlines()]
    alone = [json.loads(line) for line in (Path(on_disk["out"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    shards = [name for name in gcs.names("bucket", "run/hf/") if name.endswith(".safetensors")]
    assert len(shards) == 2  # one of each process
    written = {name: value for shard in shards for name, value in load(gcs.read("bucket", shard)).items()}
    expected = load_file(Path(on_disk["hf"]) / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(abs(written[name] - expected[name]).max() < 1e-4 for name in expected)
    there = {Path(name).name for name in gcs.names("bucket", "run/checkpoints/8/default/")}
    assert {"SHA256SUMS", "SHA256SUMS.process_0", "SHA256SUMS.process_1"} <= there
    assert not [
        name
        for name in gcs.names("bucket", "run/")
        if "unfinished" in name or "probe" in name or name.endswith("lease.json")
    ]
    assert [name for name in gcs.names("bucket", "run/hf/") if "SHA256SUMS" in name] == ["run/hf/SHA256SUMS"]
    # The list itself and the card are not compared.
    names = gcs.names("bucket", "run/hf/")
    assert verify_folder(place("gs://bucket/run/hf"))["files"] == len(names) - 2
    assert verify_folder(place("gs://bucket/run"))["files"] > 20
