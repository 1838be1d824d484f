"""`babel train` by several real processes: what one process gives, and one end for all."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from babel_jax.training.run_state import newest_step, read_json_lines
from tests.forced_devices import forced_devices

pytestmark = pytest.mark.slow
WATCHED = "evaluation/during.jsonl"
SCRIPT = Path(__file__).with_name("one_of_several.py")


def train(config, count, devices=4, orders="", overrides=(), of_each=None):
    """Runs the config by `count` processes with `devices` among them; gives (exit status, output, errors) of
    each.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(count):
        environment = forced_devices(devices // count) | {
            "BABEL_HEARTBEAT_SECONDS": "10",
            "TEST_ORDERS": orders,
        }
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
            }
        settings = [*overrides, *(of_each(number) if of_each else ())]
        command = [
            sys.executable,
            SCRIPT,
            "train",
            config,
            "--json",
            *(part for one in settings for part in ("--set", one)),
        ]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        ended = [started[0].communicate(timeout=240)]
        if "STOP" in orders:
            started[1].kill()
        ended += [process.communicate(timeout=240) for process in started[1:]]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, ended, strict=True)]


def losses(folder):
    return {line["step"]: line["loss"] for line in read_json_lines(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def config(run_config, tmp_path_factory):
    """The path of the config of a run of 6 + 4 steps, whose mesh is for four devices."""
    folder = tmp_path_factory.mktemp("several")
    path = folder / "run.toml"
    evaluation = {"batch_size": 4, "max_bytes": 500, "every": 4}
    run_config(
        folder / "run", training={"mesh": {"fsdp": 4}}, evaluation=evaluation, export_dtype="float32"
    ).save(path)
    return path


@pytest.fixture(scope="module")
def alone(config):
    """The run folder and the result of one process."""
    folder = config.with_name("alone")
    ((status, output, errors),) = train(config, 1, overrides=[f"out={folder}"])
    assert status == 0, errors[-3000:]
    return folder, json.loads(output)


def test_four_processes_give_what_one_does(config, alone):
    folder, expected = alone
    out, count = config.with_name("by-4"), 4
    ended = train(config, count, overrides=[f"out={out}"])
    assert [status for status, _, _ in ended] == [0] * count, "\n".join(
        errors[:4000] for _, _, errors in ended
    )
    assert [output != "" for _, output, _ in ended] == [number == 0 for number in range(count)]
    found = json.loads(ended[0][1])
    np.testing.assert_allclose(list(losses(out).values()), list(losses(folder).values()), rtol=1e-6)
    assert list(losses(out)) == list(losses(folder)) == list(range(10))
    for point, values in expected["bits_per_byte"].items():
        assert found["bits_per_byte"][point] == pytest.approx(values, rel=1e-5)
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    seen, expected = (
        {line["step"]: line["tasks"]["bits_per_byte"] for line in read_json_lines(run / WATCHED)}
        for run in (out, folder)
    )
    assert list(seen) == list(expected) == [4, 8]
    for step, by_language in expected.items():
        assert {code: one["score"] for code, one in seen[step].items()} == {
            code: pytest.approx(one["score"], rel=1e-5) for code, one in by_language.items()
        }
    compared = [line for line in read_json_lines(out / "metrics.jsonl") if "slowest_process" in line]
    assert [line["step"] for line in compared] == [4, 9]
    for line in compared:
        assert line["slowest_process"] in range(count)
        assert line["seconds"] > 0
        assert line["slowest_process_seconds"] >= line["median_process_seconds"] > 0
    # The log is of process 0 alone; the others may only warn.
    assert "stage first: steps 1 to 6" in ended[0][2]
    assert all("stage first" not in errors for _, _, errors in ended[1:])


@pytest.mark.parametrize(
    ("count", "mesh"),
    [(2, "{context=2, tensor=2}"), (4, "{fsdp=2, context=2}")],
    ids=["all windows shared", "each shared by two"],
)
def test_processes_may_share_windows(config, alone, count, mesh):
    """Each has other tokens or features of them."""
    folder, _ = alone
    out = config.with_name(f"shared-by-{count}")
    ended = train(
        config,
        count,
        overrides=[f"out={out}", f"training.mesh={mesh}", "training.offload_optimizer_state=true"],
    )
    assert [status for status, _, _ in ended] == [0] * count, "\n".join(
        errors[:4000] for _, _, errors in ended
    )
    np.testing.assert_allclose(list(losses(out).values()), list(losses(folder).values()), rtol=1e-5)


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on_by_another_number(config, alone):
    folder, _ = alone
    out = config.with_name("killed")
    # Behind the end of a stage, which waits for its checkpoint: one that is being written would be lost with
    # the process.
    (first, _, said), (second, _, _) = train(config, 2, orders="KILL:1:7", overrides=[f"out={out}"])
    assert (first, second) == (1, -9), said[-3000:]
    assert "process 0 of 2 lost another one of the job" in said
    assert "resumes at the last checkpoint" in said
    assert "Traceback" not in said
    # Another number of processes, of devices, another mesh, and smaller pieces of the batch, as fewer devices
    # have room for.
    changed = ["training.mesh={data=2}", "training.gradient_accumulation=2"]
    ((status, _, errors),) = train(config, 1, devices=2, overrides=[f"out={out}", *changed])
    assert status == 0, errors[-3000:]
    assert "resuming after step 6 of 10" in errors
    np.testing.assert_allclose(list(losses(out).values()), list(losses(folder).values()), rtol=1e-5)


def test_a_process_that_is_killed_while_a_checkpoint_is_written_ends_the_others_at_once(config, alone):
    """The write waits for the process that has gone, so the others may not wait for the write."""
    folder, _ = alone
    out = config.with_name("killed-in-save")
    (first, _, said), (second, _, _) = train(config, 2, orders="KILL:1:save3", overrides=[f"out={out}"])
    assert (first, second) == (1, -9), said[-3000:]
    assert "process 0 of 2 lost another one of the job" in said
    ((status, _, errors),) = train(config, 1, overrides=[f"out={out}"])
    assert status == 0, errors[-3000:]
    np.testing.assert_allclose(list(losses(out).values()), list(losses(folder).values()), rtol=1e-5)


def test_a_run_resumes_from_another_replica_s_disk(config, tmp_path):
    """Of three replicas the first writes nothing locally. Of the other two, one host loses its disk."""
    settings = [
        "training.mesh={data=3}",
        "training.global_batch_size=3",
        "evaluation.batch_size=3",
        "training.local_checkpoint_every=1",
    ]

    def run(name, orders=""):
        folders = [f"out={tmp_path / name}", f"training.local_checkpoints={tmp_path / name}-local"]
        return train(config, 3, 3, orders, [*settings, *folders])

    def locally(name):
        return {path.parents[1].name: path for path in tmp_path.glob(f"{name}-local/*/process_*/*/[0-9]*")}

    ended = run("undisturbed")
    assert [status for status, _, _ in ended] == [0] * 3, "\n".join(errors[-3000:] for _, _, errors in ended)
    assert not locally("undisturbed")

    # The run folder has step 4, the best so far; the disks of processes 1 and 2 have step 5.
    assert run("lost", "KILL:1:5")[1][0] == -9
    assert newest_step(tmp_path / "lost" / "checkpoints") == 4
    found = locally("lost")
    assert sorted(found) == ["process_1", "process_2"]
    shutil.rmtree(found["process_1"])
    ended = run("lost")
    assert [status for status, _, _ in ended] == [0] * 3, "\n".join(errors[-3000:] for _, _, errors in ended)
    assert "resuming after step 5 of 10, from local checkpoints" in ended[0][2]
    assert losses(tmp_path / "lost") == losses(tmp_path / "undisturbed")
    exported = sorted((tmp_path / "lost" / "hf").glob("*.safetensors"))
    assert len(exported) == 3
    for file in exported:
        assert file.read_bytes() == (tmp_path / "undisturbed" / "hf" / file.name).read_bytes()


def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_the_job(config):
    """It would wait for the others at one place, and they for its part at another."""
    (first, _, said), (second, _, reason) = train(
        config, 2, orders="FULL:1:1", overrides=[f"out={config.with_name('full')}"]
    )
    assert (first, second) == (2, 2), said[-3000:]
    assert "File too large" in reason
    told = [line for line in said.splitlines() if line.startswith("babel: ")]
    assert len(told) == 1
    assert "process 1 of 2" in told[0]
    assert "File too large" in told[0]


def test_a_damaged_newest_checkpoint_is_set_aside_by_all(config, alone):
    """One of two processes would find it whole: what it needs of it is."""
    folder, _ = alone
    out = config.with_name("damaged")
    shutil.copytree(folder, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "hf")
    for file in (out / "checkpoints" / "10").rglob("*"):
        if file.is_file() and "d" in file.parts[-2:-1]:
            file.write_bytes(file.read_bytes()[:10])
    ended = train(config, 2, overrides=[f"out={out}"])
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(errors[:4000] for _, _, errors in ended)
    assert "checkpoint 10 cannot be read" in ended[0][2]
    assert (out / "checkpoints" / "10.damaged").is_dir()
    np.testing.assert_allclose(list(losses(out).values()), list(losses(folder).values()), rtol=1e-6)


def test_a_process_that_hangs_ends_the_others(config):
    """Stopped, it neither answers nor ends; only the missing heartbeats show it."""
    (first, _, said), _ = train(config, 2, orders="STOP:1:4", overrides=[f"out={config.with_name('hangs')}"])
    assert first not in (0, None)
    assert "stopped sending heartbeats" in said


def test_sigterm_of_one_process_stops_all_at_one_step_with_a_checkpoint(config):
    out, steps = config.with_name("preempted"), "stages.0.steps=2000"
    ended = train(config, 2, orders="TERM:1:3", overrides=[f"out={out}", steps])
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(errors[-3000:] for _, _, errors in ended)
    result = json.loads(ended[0][1])
    assert result["preempted"] is True
    assert result["summary"].endswith("the same command resumes")
    (newest,) = sorted(int(path.name) for path in (out / "checkpoints").iterdir())[-1:]
    assert f"saved step {newest} of " in result["summary"]
    assert list(losses(out)) == list(range(newest))
    assert not (out / "lease.json").exists()


def test_ctrl_c_in_one_process_ends_all_alike(config):
    out, steps = config.with_name("interrupted"), "stages.0.steps=2000"
    ended = train(config, 2, orders="INT:1:3", overrides=[f"out={out}", steps])
    assert [status for status, _, _ in ended] == [130, 130], "\n".join(
        errors[-3000:] for _, _, errors in ended
    )
    assert all("; the same command resumes" in errors for _, _, errors in ended)
    assert list(losses(out)) == list(range(newest_step(out / "checkpoints")))


def test_processes_of_different_configs_are_refused_before_anything_is_written(config):
    out = config.with_name("different")
    ended = train(
        config,
        2,
        overrides=[f"out={out}"],
        of_each=lambda number: [f"optimizer.b1=0.{8 + number}", f"seed={number}"],
    )
    assert [status for status, _, _ in ended] == [2, 2]
    assert all("not as in process 0 is seed, optimizer.b1" in errors for _, _, errors in ended)
    assert not out.exists()
