"""`babel sft` under faults: ended in its writes and between steps, a full disk, a damaged checkpoint, two at
one output.
"""

import errno
import fcntl
import json
import os
import shutil
import signal

import pytest

from babel_jax.cli import main
from babel_jax.files import PARTIAL
from babel_jax.training.metrics import Metrics
from tests.hostile.faults import Killed, faults

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def config_file(chat_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    turns = [
        [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number + 1}."}]
        for number in range(30)
    ]
    rows = [{"id": str(number), "messages": turn} for number, turn in enumerate(turns)]
    (folder / "ha.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.toml"
    path.write_text(
        f'out = "{folder}/run"\nexport_dtype = "float32"\n'
        "[model.shape]\nmax_position_embeddings = 64\n"
        + "".join(f"{key} = {value}\n" for key, value in SHAPE.items())
        + "[training]\n"
        'global_batch_size = 4\ncompute_dtype = "float32"\ncheckpoint_every = 2\ncompilation_cache = false\n'
        '[[stages]]\nname = "chat"\nsteps = 5\nschedule = { peak = 1e-2 }\nmixture = { max_epochs = 1000.0 '
        "}\n"
        f'[data]\nfolder = "{folder}/data"\ntokenizer = "{chat_tokenizer}"\nseq_len = 64\nheldout_fraction '
        "= 0.1\nconversations = true\n"
        '[[data.sources]]\nlanguage = "ha"\nkind = "chat"\ntext_key = "messages"\npath = '
        f'"{folder}/ha.jsonl"\n'
    )
    return path


@pytest.fixture
def sft(config_file, tmp_path, capsys):
    """Runs `babel sft`: the exit status, and what it wrote to standard error."""

    def run(out="run"):
        capsys.readouterr()
        status = main(["sft", str(config_file), "--set", f"out={tmp_path / out}", "--json"])
        return status, capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def undisturbed(config_file):
    """What a run leaves, and how many renames, links and syncs it makes."""
    with pytest.MonkeyPatch.context() as patch, faults(patch) as counted:
        assert main(["sft", str(config_file)]) == 0
    return result(config_file.parent / "run"), counted.count


def result(folder):
    """What a user has of a run: each step's loss, the scores, and the exported folder to the bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hf = {path.name: path.read_bytes() for path in sorted((folder / "hf").iterdir())}
    # The card and the digests beside it have the run's name, which differs here.
    for name in ("README.md", "SHA256SUMS"):
        assert hf.pop(name)
    return (
        [(line["step"], line["loss"]) for line in lines],
        json.loads((folder / "summary.json").read_text())["bits_per_byte"],
        hf,
    )


def assert_one_line(said):
    (line,) = [line for line in said.err.splitlines() if line.startswith("babel: ")]
    assert "Traceback" not in said.err
    return line


@pytest.mark.slow
def test_a_full_disk_then_ended_in_its_writes(sft, undisturbed, tmp_path, monkeypatch):
    expected, count = undisturbed
    with faults(monkeypatch, count // 2, errno.ENOSPC):
        status, said = sft()
    assert status == 2
    assert "no space left on the disk" in assert_one_line(said)
    with faults(monkeypatch, count // 4), pytest.raises(Killed):
        sft()
    assert sft()[0] == 0
    assert result(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob(f"*{PARTIAL}"))


def stopped_at(step, monkeypatch, what):
    """Has something happen after a step, once."""
    log = Metrics.log

    def logged(self, now, *rest):
        if now == step:
            monkeypatch.setattr(Metrics, "log", log)
            what()
        return log(self, now, *rest)

    monkeypatch.setattr(Metrics, "log", logged)


def killed():
    raise Killed


@pytest.mark.slow
def test_sigterm_then_killed_between_steps_then_the_newest_checkpoint_damaged(
    sft, undisturbed, tmp_path, monkeypatch
):
    stopped_at(1, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    status, said = sft()
    assert (status, json.loads(said.out)["preempted"]) == (0, True)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir() if path.name.isdecimal()} <= {"1", "2"}
    stopped_at(4, monkeypatch, killed)
    with pytest.raises(Killed):
        sft()
    newest = max(
        (path for path in checkpoints.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
    )
    assert newest.name == "4"
    values = max((newest / "default").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    with open(values, "r+b") as file:
        file.seek(values.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    status, said = sft()
    assert status == 0
    assert "not the bytes that were written" in said.err
    assert result(tmp_path / "run") == undisturbed[0]


def test_another_process_has_the_output(sft, undisturbed, config_file, tmp_path):
    shutil.copytree(config_file.parent / "run", tmp_path / "run")
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        status, said = sft()
    finally:
        os.close(handle)
    assert status == 2
    assert "another process is at work in it" in assert_one_line(said)
    assert result(tmp_path / "run") == undisturbed[0]
