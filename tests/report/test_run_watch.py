"""`babel watch`: the state of a run from its files, while it grows."""

import json
import os
import signal
import time

import pytest

from babel_jax.cli import main
from babel_jax.errors import BadInput
from babel_jax.report.run_watch import run_state, watch_run


def line(step, **values):
    return {
        "step": step,
        "stage": "recovery",
        "loss": 4.0 - step,
        "rate": 3e-4,
        "gradient_norm": 1.5,
        "tokens_per_second": 2000.0,
        "seconds": 30.0,
        "total_steps": 40,
        "loss_by_language": {"sw": 5.0 - step},
        "tokens_by_language": {"en": 1000, "sw": 3000},
        "epochs_by_language": {"sw": 0.25},
        **values,
    }


def write(folder, lines):
    # As a process does that is at work in the folder.
    (folder / "lease.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_the_state_of_a_run(tmp_path):
    write(tmp_path, [line(0), line(1)])
    (tmp_path / "evaluation").mkdir()
    during = {"step": 1, "tasks": {"bits_per_byte": {"sw": {"score": 1.875}}}}
    (tmp_path / "evaluation" / "during.jsonl").write_text(json.dumps(during) + "\n")
    state = run_state(tmp_path)
    *lines, curves = state["summary"].splitlines()
    assert curves.startswith(f"curves: tensorboard --logdir {tmp_path}/tensorboard")
    assert lines == [
        f"{tmp_path}: step 2 of 40, stage recovery, 0:19:00 left",
        "loss 3.5000 nats/token, rate 3.00e-04, gradient norm 1.50, 2,000 tokens/s (means of 20 steps)",
        "language  nats/token          tokens  passes  bits/byte",
        "en                 -           1,000       -          -",
        "sw            4.5000           3,000    0.25     1.8750",
    ]


def test_a_run_that_stopped_or_was_killed_is_told(tmp_path):
    write(tmp_path, [line(0)])
    assert run_state(tmp_path)["stopped"] is False
    os.utime(tmp_path / "lease.json", (time.time() - 3600,) * 2)
    killed = run_state(tmp_path)
    (tmp_path / "lease.json").unlink()
    stopped = run_state(tmp_path)
    assert killed["stopped"] is stopped["stopped"] is True
    words = "stopped: no process is at work in it; the command that began it resumes"
    assert stopped["summary"].splitlines()[0] == f"{tmp_path}: step 1 of 40, stage recovery, {words}"


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path):
    shown = []

    def wait(seconds):
        if (tmp_path / "run").is_dir():
            raise KeyboardInterrupt
        (tmp_path / "run").mkdir()
        write(tmp_path / "run", [line(0)])

    last = watch_run(tmp_path / "run", 5, shown.append, wait)
    assert shown[0].startswith(f"{tmp_path / 'run'}: no such folder yet; waiting for a run")
    assert last["step"] == 1


def test_it_is_shown_until_the_run_is_finished(tmp_path):
    write(tmp_path, [line(0)])
    shown, waits = [], []

    def wait(seconds):
        waits.append(seconds)
        write(tmp_path, [line(step) for step in range(len(waits) + 1)])
        if len(waits) == 2:
            summary = {"out": "x", "hf": "x/hf", "bits_per_byte": {}, "summary": "done"}
            (tmp_path / "summary.json").write_text(json.dumps(summary))

    last = watch_run(tmp_path, 5, shown.append, wait)
    assert waits == [5, 5]
    assert [text.split(",")[0].rpartition(": ")[2] for text in shown] == ["step 1 of 40", "step 2 of 40"]
    assert last["summary"].startswith(f"{tmp_path}: step 3 of 40, stage recovery, finished")


def test_control_c_leaves_the_run_alone(tmp_path, capfd):
    write(tmp_path, [line(0)])
    last = watch_run(tmp_path, 5, lambda _: None, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert last["step"] == 1
    assert capfd.readouterr().err == "babel: leaving; the run continues\n"


def test_without_a_step_and_without_a_folder(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"not finished: no step in {tmp_path} yet\n"
    with pytest.raises(BadInput, match="no such run folder"):
        run_state(tmp_path / "missing")


def test_a_run_of_an_older_version_has_no_total(tmp_path):
    write(tmp_path, [{"step": 0, "stage": "only", "loss": None}])
    assert "step 1, stage only, time left unknown" in run_state(tmp_path)["summary"]
