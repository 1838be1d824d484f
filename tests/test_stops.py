"""Ctrl-C in real processes: the same words in all commands, no traceback, and the same command resumes."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from babel_jax.cli import main
from babel_jax.distributed import signals
from babel_jax.distributed.signals import interruptible
from babel_jax.inference.chat import talk
from babel_jax.training.run_state import newest_step, read_json_lines

STOPPING = "babel: stopping; again to end at once"
METRICS = "babel_jax.training.metrics:Metrics.log"


def pressed(arguments, places):
    """Runs a command in a process group of its own, with Ctrl-C at these places; gives its status and the
    lines of this program on standard error.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "TEST_PRESS": places,
    }
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pressing.py")), *map(str, arguments)],
        env=environment,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, [line for line in ended.stderr.splitlines() if line.startswith("babel: ")]


def losses(run):
    return [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def config_file(small_settings, small_model, tmp_path_factory):
    """A config of four steps from random weights."""
    folder = tmp_path_factory.mktemp("stops")
    sources = "\n".join(
        f'[[data.sources]]\nlanguage = "{source.language}"\npath = "{source.path}"'
        for source in small_settings.sources
        if source.language in ("en", "sw")
    )
    path = folder / "config.toml"
    path.write_text(f"""
out = "{folder / "run"}"
export_dtype = "float32"
[model.shape]
vocab_size = 1280
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 128
[training]
global_batch_size = 4
compute_dtype = "float32"
checkpoint_every = 2
[evaluation]
max_bytes = 2000
[[stages]]
name = "only"
steps = 8
schedule = {{ peak = 1e-3 }}
[data]
folder = "{folder / "data"}"
tokenizer = "{small_model}"
seq_len = 64
heldout_fraction = 0.1
workers = 2
{sources}
""")
    return path


@pytest.fixture(scope="module")
def trained(config_file):
    """The run folder."""
    assert main(["train", str(config_file), "--json"]) == 0
    return config_file.parent / "run"


@pytest.mark.slow
def test_the_first_saves_this_step_and_the_same_command_resumes(config_file, trained, tmp_path):
    command = ["train", config_file, "--set", f"out={tmp_path / 'run'}"]
    status, said = pressed(command, f"{METRICS}:4")
    assert (status, said) == (
        130,
        [
            "babel: stopping after this step; again to drop it",
            "babel: saved step 4 of 8; the same command resumes",
        ],
    )
    assert newest_step(tmp_path / "run" / "checkpoints") == 4
    assert main([*map(str, command), "--json"]) == 0
    losses = [
        [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]
        for run in (tmp_path / "run", trained)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_second_drops_only_what_came_after_the_last_checkpoint(config_file, trained, tmp_path):
    command = ["train", config_file, "--set", f"out={tmp_path / 'run'}"]
    # In step 6, and while its checkpoint is written: that of step 4 is whole.
    save = "babel_jax.training.run_state:Checkpoints.wait:1"
    status, said = pressed(command, f"{METRICS}:6 {save}")
    kept = newest_step(tmp_path / "run" / "checkpoints")
    assert (status, said[1:]) == (
        130,
        [f"babel: dropped all after step {kept}; the same command resumes there"],
    )
    assert main([*map(str, command), "--json"]) == 0
    losses = [
        [line["loss"] for line in read_json_lines(run / "metrics.jsonl")]
        for run in (tmp_path / "run", trained)
    ]
    assert losses[0] == losses[1]


COMMANDS = {
    "prepare": (
        ["prepare", "CONFIG", "--set", "data.folder=NEW"],
        "babel_jax.data.windows.prepare:_warn_about_losses:1",
        r"stopped; the same command resumes",
    ),
    "train outside of steps": (
        ["train", "CONFIG", "--set", "out=NEW"],
        "babel_jax.evaluation.scoring:_score_rows:1",
        r"stopped in train, 8 of 8 steps; the same command resumes",
    ),
    "sensitivity": (
        ["sensitivity", "HF", "--out", "NEW", "--languages", "en"],
        "babel_jax.studies.sensitivity:_run:3",
        r"stopped in sensitivity, [01] of 2 layers; the same command resumes",
    ),
    "ablate": (
        ["ablate", "HF", "--out", "NEW", "--variants", "among:copy"],
        "babel_jax.evaluation.scoring:_score_rows:1",
        r"stopped in bits per byte, 0 of \d+ sequences; the same command resumes",
    ),
    "evaluate": (
        ["evaluate", "HF", "--max-bytes", "1000", "--languages", "en"],
        "babel_jax.evaluation.scoring:_score_rows:1",
        r"stopped in bits per byte, 0 of \d+ sequences; the same command begins again",
    ),
    "judge": (
        ["judge", "QUALITY"],
        "babel_jax.quality.judge:_draw:3",
        r"stopped in sampling en, 2 rows; the same command resumes",
    ),
    "init": (
        ["init", "--model", "HF", "--data", "TEXT", "--out", "NEW"],
        "babel_jax.recipe.first_config:first_config:1",
        r"stopped; the same command begins again",
    ),
    "generate": (
        ["generate", "HF", "One"],
        "babel_jax.inference.generation:extend:1",
        r"stopped; the same command begins again",
    ),
    "convert": (
        ["convert", "HF", "NEW"],
        "babel_jax.model_folders.streaming:pieces:2",
        r"stopped in writing the model, .* of .*B; the same command resumes",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_words_in_every_command(name, config_file, trained, small_settings, tmp_path):
    arguments, place, ends = COMMANDS[name]
    quality = tmp_path / "quality.toml"
    source = next(source for source in small_settings.sources if source.language == "en")
    quality.write_text(
        f'out = "{tmp_path / "quality"}"\n[[sources]]\nlanguage = "en"\npath = "{source.path}"\n'
        '[judge]\nmodel = "none"\nendpoint = "http://localhost:9/v1"\n[classifier]\nmodel = "none"\n'
    )
    values = {
        "CONFIG": config_file,
        "HF": trained / "hf",
        "QUALITY": quality,
        "TEXT": Path(source.path).parent,
    }
    given = [str(values.get(one, one)).replace("NEW", str(tmp_path / "new")) for one in arguments]
    status, said = pressed(given, place)
    assert status == 130, said
    assert said[0] == STOPPING
    assert re.fullmatch(f"babel: {ends}", said[-1]), said
    assert len(said) == 2


def test_a_press_is_answered_while_the_main_thread_is_in_c(monkeypatch, capfd):
    """Python's handlers wait there, as they do while XLA compiles. The thread has to answer."""
    in_c, early = threading.Event(), []

    def compute(rounds):
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", rounds)  # C code, without Python's lock

    def press():
        in_c.wait()
        compute(50_000)  # until the main thread is in C
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    answer = signals._Answers.answer_early
    monkeypatch.setattr(signals._Answers, "answer_early", lambda block: early.append(answer(block)))
    monkeypatch.setattr(signals, "_SECONDS_TO_HANDLE", 0.02)

    def work():
        in_c.set()
        compute(500_000)

    with pytest.raises(KeyboardInterrupt), interruptible():
        work()
    assert len(early) == 1
    assert capfd.readouterr().err == STOPPING + "\n"


class Answers:
    """A conversation whose second answer is interrupted."""

    messages: ClassVar[list] = []

    def answer(self, text):
        if text == "two":
            os.kill(os.getpid(), signal.SIGINT)
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        return {"text": text}


def test_chat_drops_an_answer_and_leaves_with_a_word(capfd):
    turns = iter(["one", "two", "three"])

    def read(_):
        turn = next(turns, None)
        if turn is None:
            os.kill(os.getpid(), signal.SIGINT)
        return turn

    said = talk(Answers(), read)
    out, err = capfd.readouterr()
    assert [message["content"] for message in said["messages"]] == ["one", "three"]
    assert said["summary"] == "\n2 turns"
    assert out.startswith("Ctrl-D leaves the conversation")
    assert "babel: dropping the answer; again to end at once\n" in err
    assert err.endswith("babel: leaving\n")
