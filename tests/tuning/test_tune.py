"""`babel tune`: candidates measured in turns, kept, resumed, and judged against the spread."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib

import jax
import pytest

from babel_jax.cli import main
from babel_jax.config import Config
from babel_jax.config.file import load_config, parse_settings
from babel_jax.hardware import CHIPS
from babel_jax.model.flops import model_flops_per_token
from babel_jax.tpu.cuda import as_chip
from babel_jax.training.deepening import Depth
from babel_jax.tuning import bench
from babel_jax.tuning.bench import Bench
from babel_jax.tuning.candidates import (
    Possible,
    asked_candidates,
    candidate_of,
    default_candidates,
    later_candidates,
)
from babel_jax.tuning.journal import Journal, mark_of
from babel_jax.tuning.verdict import MeasuredCandidate, verdict_of, winners_of

VALUES = {
    "out": "run",
    "model": {
        "shape": {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
    "data": {"folder": "not-there", "seq_len": 32},
    "training": {"global_batch_size": 8, "compute_dtype": "float32"},
    "stages": [
        {"name": "first", "tokens": 4096, "schedule": {"peak": 1e-3}},
        {"name": "second", "steps": 4, "schedule": {"peak": 1e-3}},
    ],
}
QUICK = ("--rounds", "2", "--steps", "2", "--try", "training.remat=full")


@pytest.fixture
def config():
    return parse_settings(Config, VALUES, "test")


@pytest.fixture
def tune(config, tmp_path, capsys):
    """Runs `babel tune` on a config without data or weights; gives the status, the output and the errors."""
    path = tmp_path / "run.toml"
    config.save(path)

    def run(*options):
        status = main(["tune", str(path), "--out", str(tmp_path / "tuned"), *options])
        return status, *capsys.readouterr()

    return run


def lines_of(tmp_path):
    text = (tmp_path / "tuned" / "measurements.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_two_candidates_are_measured_in_turns(tune, config, tmp_path):
    status, out, _ = tune(*QUICK, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["device"]["kind"] == jax.devices()[0].device_kind
    assert found["device"]["versions"]["jax"] == jax.__version__
    # Forwards and backwards; then the same again, if the other candidate is faster.
    lines = lines_of(tmp_path)
    today, full = {}, {"remat": "full"}
    turns = [(today, 0), (full, 0), (full, 1), (today, 1)]
    again = [(today, 4), (full, 4), (full, 5), (today, 5)]
    assert [(line["changes"], line["visit"]) for line in lines] in (turns, turns + again)
    for line in lines:
        assert len(line["step_seconds"]) == 2
        assert line["seconds"] == pytest.approx(sum(line["step_seconds"]) / 2)
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["seconds"])
        assert line["compile_seconds"] > 0
        assert line["failure"] is line["forecast_seconds"] is None
        assert line["step"] == {
            "stage": "second", "parameters": line["step"]["parameters"], "layers": 2, "hidden_size": 32,
            "global_batch_size": 8, "seq_len": 32,
        }  # fmt: skip
    today, other = found["candidates"]
    assert today["changes"] == {}
    assert len(today["step_seconds"]) in (2, 4)
    assert other["changes"] == {"training.remat": "full"}
    # The settings are those of the faster one, or today's; a config takes them.
    settings = tomllib.loads((tmp_path / "tuned" / "settings.toml").read_text(encoding="utf-8"))
    expected = found["chosen"].get("training.remat", str(config.training.remat))
    assert settings == {"training": {"remat": expected}}
    taken = load_config(tmp_path / "run.toml", tuple(found["apply"]))
    assert taken.training.remat == expected
    assert "no forecast" in found["summary"]


def test_what_is_measured_is_not_measured_again(tune, tmp_path):
    first = json.loads(tune(*QUICK, "--json")[1])
    before = lines_of(tmp_path)
    second = json.loads(tune(*QUICK, "--json")[1])
    assert lines_of(tmp_path) == before
    assert second == first


def test_another_step_has_another_mark(config):
    model = Depth(0, config.model.shape, ())
    marks = {mark_of(config, config.stages[1], model)}
    for changes in ({"global_batch_size": 4}, {"remat": "full"}, {"compute_dtype": "bfloat16"}):
        values = {**VALUES, "training": VALUES["training"] | changes}
        marks.add(mark_of(parse_settings(Config, values, "test"), config.stages[1], model))
    assert len(marks) == 4
    # Where checkpoints go is no matter of the step.
    values = {**VALUES, "out": "other", "training": VALUES["training"] | {"checkpoint_every": 7}}
    assert mark_of(parse_settings(Config, values, "test"), config.stages[1], model) in marks


def test_a_stopped_tune_resumes(tune, tmp_path, monkeypatch):
    def stop(self, *arguments, add=Journal.add):
        if len(self) == 2:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        status, out, err = tune(*QUICK)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1].endswith("the same command resumes")
    before = lines_of(tmp_path)
    # A kill in the middle of a line.
    with open(tmp_path / "tuned" / "measurements.jsonl", "a", encoding="utf-8") as file:
        file.write('{"mark": "ha')
    assert tune(*QUICK)[0] == 0
    after = lines_of(tmp_path)
    assert after[:2] == before
    assert len(after) in (4, 8)


def test_a_candidate_that_cannot_run_is_a_line(tune, tmp_path):
    """Splash attention has no blocks of 32 tokens."""
    status, out, err = tune(*QUICK[:4], "--try", "training.attention=xla,splash", "--json")
    assert status == 0, err
    failed = [line for line in lines_of(tmp_path) if line["failure"]]
    assert len(failed) == 1
    assert failed[0]["changes"] == {"attention": "splash"}
    assert "multiple of 128 tokens" in failed[0]["failure"]
    assert json.loads(out)["candidates"][2]["seconds"] is None


@pytest.mark.slow
def test_out_of_memory_is_tried_again_alone(config, tune, tmp_path, monkeypatch):
    """The message is the one of XLA on an H100; the state that the step took is gone."""
    failures = []

    def fail_once(self, built, steps, timed=Bench._timed):
        if len(self._built) == 2 and not failures:
            failures.append(self._take_state(built.setup))
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 79.22GiB."
            )
        return timed(self, built, steps)

    monkeypatch.setattr(Bench, "_timed", fail_once)
    status, _, err = tune(*QUICK)
    assert status == 0, err
    assert "remat=full: out of memory; once more, alone" in err
    assert {line["failure"] for line in lines_of(tmp_path)} == {None}


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "babel: kept 1 measurements; the same command resumes"),
        (signal.SIGTERM, 0, "stopped by SIGTERM: kept 1 measurements; the same command resumes"),
    ],
)
def test_a_signal_stops_between_two_visits(tune, tmp_path, monkeypatch, number, status, said):
    def timed(self, built, steps):
        signal.raise_signal(number)
        return {"step_seconds": [1.0], "device_peak_gib": None}

    monkeypatch.setattr(Bench, "_timed", timed)
    found, out, err = tune(*QUICK)
    assert (found, (out or err).splitlines()[-1]) == (status, said)
    assert len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize("chip", [as_chip("h100", 79.6), CHIPS["v5e"]], ids=lambda chip: chip.name)
def test_figures_of_the_published_rates_stand_beside_the_measurement(config, chip, monkeypatch):
    """A program for CPUs has no estimated cycles, so there is no forecast; the bound is of its FLOPs."""
    monkeypatch.setattr(bench, "chip_at_hand", lambda: chip)
    model = Depth(0, config.model.shape, ())
    found = Bench(config.stages[1], model).visit(candidate_of(config, {}), 1)
    flops = 8 * 32 * model_flops_per_token(config.model.shape, 32)
    assert found["forecast_seconds"] is None
    assert 0.9 * flops / chip.bf16 <= found["bound_seconds"] < found["step_seconds"][0]


def test_the_fastest_of_many_is_measured_once_more(config, tune, tmp_path, monkeypatch):
    """`full` has luck in the first round alone, so today's settings stay."""
    visits = []

    def timed(self, built, steps):
        visits.append(built)
        return {"step_seconds": [0.5 if len(visits) == 2 else 1.0], "device_peak_gib": None}

    monkeypatch.setattr(Bench, "_timed", timed)
    status, out, _ = tune("--rounds", "1", "--try", "training.remat=full", "--json")
    found = json.loads(out)
    assert status == 0
    assert [line["visit"] for line in lines_of(tmp_path)] == [0, 0, 2, 2]
    assert (found["chosen"], found["keep"], found["gain"]) == ({}, True, 0.0)


def test_a_step_that_does_not_fit_is_told_before_it_runs(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "device_capacity", lambda: 100_000)
    status, _, err = tune(*QUICK)
    assert status == 2
    last = err.splitlines()[-1]
    assert last.startswith("babel: none of 2 candidates runs on 1 x cpu (out of memory: parameters")
    assert all(line["failure"].startswith("out of memory") for line in lines_of(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "third"], "--stage third: no such stage; the config has first, second"),
        (["--try", "training.remat=mlp"], "--try: no candidates: these are the settings of the config"),
        (["--try", "training.remat="], "--try training.remat=: not of the form training.remat=mlp,full"),
        (["--try", "data.seq_len=64"], "data.seq_len is not a setting to tune; valid: training.remat, "),
        (["--try", "remat=full"], "--try remat=full: not of the form training.remat=mlp,full"),
        (["--try", "training.remat=half"], "--try: training.remat: Input should be 'none', 'dots'"),
        (["--try", "training.global_batch_size=4"], "training.global_batch_size is not a setting to tune"),
        (["--try", "training.gradient_accumulation=3"], "is not divisible by gradient_accumulation = 3"),
        (
            ["--set", "training.attention=splash"],
            "attention = splash is for a tpu, and this machine",
        ),
        (["--set", "training.attention=cudnn"], "attention = cudnn is for a gpu, and this machine"),
        (["--set", "prices={v5e=1.2}"], "prices: the config is for v5e, and this machine has cpu"),
        (["--set", "training.mesh={fsdp=8}"], "training.mesh: data = 1, fsdp = 8"),
        (["--set", "stages=[]"], "stages: the config has none"),
        ([*QUICK, "--set", "training.compiler_options={no_such=true}"], "training.compiler_options: "),
        (["--out", "/proc/tuned"], "/proc/tuned: no folder can be made here"),
        (["--out", "/dev/null"], "/dev/null"),
        (["--out", "gs://bucket/tuned"], "the folder of measurements must be a folder on disk"),
        (["--out", "others"], "others: not empty and not a folder of babel tune"),
    ],
)
def test_bad_input_is_one_line(tune, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("mine")
    status, out, err = tune(*options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def measured(changes, *visits, failure=None):
    config = parse_settings(Config, VALUES, "test")
    return MeasuredCandidate(candidate_of(config, changes), list(visits), 1.0, 1.0, None, None, None, failure)


def test_a_difference_within_the_spread_keeps_todays_settings():
    today = measured({}, [1.0, 1.0, 1.0], [1.1, 1.1, 1.1])
    # Medians are 1.05, 0.98 and 0.80 seconds; today's visits differ by 0.1 of 1.05.
    near, far = measured({"remat": "full"}, [0.98] * 6), measured({"remat": "none"}, [0.8] * 6)
    verdict = verdict_of(today, [near])
    assert verdict.chosen is today
    assert verdict.spread == pytest.approx(0.1 / 1.05)
    assert verdict.gain == pytest.approx(1 - 0.98 / 1.05)
    assert verdict_of(today, [near, far]).chosen is far
    # A gain below one percent is none, even without a spread.
    assert (
        verdict_of(measured({}, [1.0]), [measured({"remat": "full"}, [0.995])]).chosen.candidate.changes == {}
    )


def test_without_todays_settings_the_fastest_is_taken():
    failed = measured({}, failure="out of memory: ...")
    assert verdict_of(failed, [measured({"remat": "full"}, [2.0])]).chosen.seconds == 2.0
    assert verdict_of(failed, []) is None


def test_faster_settings_are_measured_together_and_a_large_one_in_smaller_pieces(config):
    today = measured({}, [1.0], [1.0])
    others = [
        measured({"remat": "attention"}, [0.9]),
        measured({"remat": "gate"}, [0.8]),
        measured({"scan_layers": False}, [0.7]),
        measured({"gradient_accumulation": 2}, [1.2]),
        measured({"remat": "none"}, failure="out of memory: ..."),
    ]
    winners = winners_of(today, others)
    assert winners == {"remat": "gate", "scan_layers": False}
    possible = Possible(config.model.shape, "cpu", 32, [1, 2, 4, 8])
    more = later_candidates(config, possible, winners, ["none", "dots"])
    assert [one.changes for one in more] == [winners, {"remat": "dots", "gradient_accumulation": 2}]


@pytest.mark.parametrize(
    ("platform", "attention"), [("cpu", []), ("tpu", ["xla"]), ("gpu", ["xla"]), ("cuda", ["xla"])]
)
def test_default_candidates_differ_in_one_setting(config, platform, attention):
    shape = config.model.shape.model_copy(update={"head_dim": 64})
    values = {**VALUES, "training": {"global_batch_size": 8, "gradient_accumulation": 2}}
    config = parse_settings(Config, values, "test")
    found = default_candidates(config, Possible(shape, platform, 256, [1, 2, 4]))
    assert found[0].changes == {}
    changes = [one.changes for one in found[1:]]
    assert all(len(one) == 1 for one in changes)
    assert [one["remat"] for one in changes if "remat" in one] == [
        "none", "dots", "gate", "projections", "attention", "full",
    ]  # fmt: skip
    assert {"scan_layers": False} in changes
    assert [one["gradient_accumulation"] for one in changes if "gradient_accumulation" in one] == [1, 4]
    assert [one["attention"] for one in changes if "attention" in one] == attention


def test_values_of_all_types_are_combined(config):
    tries = ["training.scan_layers=true,false", "training.mesh={fsdp=-1},{data=1, fsdp=1}"]
    found = asked_candidates(config, tries)
    assert [dict(one.changes) for one in found] == [
        {},
        {"mesh": {"data": 1, "fsdp": 1}},
        {"scan_layers": False},
        {"scan_layers": False, "mesh": {"data": 1, "fsdp": 1}},
    ]
    assert found[3].name == "scan_layers=false, mesh={data=1, fsdp=1}"


def started(path, out, options, devices, process=0, processes=1, port=0):
    """`babel tune`, alone or as one of several processes, with so many devices among them."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
    }
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
    command = [sys.executable, "-m", "babel_jax.cli", "tune", str(path), "--out", str(out), "--json"]
    return subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_on_eight_devices(config, tmp_path, processes):
    """One process compares two meshes. Of two processes, which compare two policies, one writes and
    speaks.
    """
    path = tmp_path / "run.toml"
    config.save(path)
    tries = "training.mesh={fsdp=8},{data=2,fsdp=4}" if processes == 1 else "training.remat=full"
    options = ("--rounds", "1", "--set", "training.mesh={fsdp=8}", "--try", tries)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [
        started(path, tmp_path / "tuned", options, 8, number, processes, port) for number in range(processes)
    ]
    ended = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0] * processes, ended[0][1][-3000:]
    assert [out != "" for out, _ in ended] == [number == 0 for number in range(processes)]
    found = json.loads(ended[0][0])
    assert (found["device"]["devices"], found["device"]["processes"]) == (8, processes)
    assert all(one["failure"] is None for one in found["candidates"]), found["candidates"]
    assert len(lines_of(tmp_path)) in (2, 4)
