"""Two processes that prepare one folder, train one run or convert into one folder, begun at the same moment,
on a disk with locks and on one without.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from babel_jax.cli import main
from babel_jax.digests import check_sums, lists_below

SCRIPT = Path(__file__).with_name("one_of_two.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def both():
    """Has two processes run a command; gives the answers, that of the worse status last."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT)], text=True, env=ENVIRONMENT, **pipes) for _ in range(2)
    ]
    assert [one.stdout.readline() for one in processes] == ["ready\n"] * 2

    def run(locks, *arguments):
        for one in processes:
            one.stdin.write(
                json.dumps({"arguments": [str(part) for part in arguments], "locks": locks}) + "\n"
            )
            one.stdin.flush()
        return sorted(
            (json.loads(one.stdout.readline()) for one in processes), key=lambda answer: answer["status"]
        )

    yield run
    for one in processes:
        one.stdin.close()
        assert one.wait(timeout=60) == 0


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_refused(answer):
    assert answer["status"] == 2
    (line,) = [line for line in answer["said"].splitlines() if line.startswith("babel: ")]
    assert "is at work in it" in line
    assert "Traceback" not in answer["said"]


@pytest.mark.slow
def test_two_at_one_output(both, recipe_config, small_settings, small_model, small_prepared, shape, tmp_path):
    stage = {"name": "only", "steps": 6, "schedule": {"peak": 5e-3}, "mixture": {"max_epochs": 1000.0}}
    config = recipe_config(tmp_path / "run", small_settings, small_model, {"shape": shape}, stages=[stage])
    config.save(tmp_path / "config.toml")
    for locks in (True, False):
        folder = tmp_path / f"data, locks {locks}"
        first, second = both(locks, "prepare", tmp_path / "config.toml", "--set", f"data.folder={folder}")
        assert first["status"] == 0
        if second["status"] == 0:
            assert not locks or "(waiting, " in first["said"] + second["said"]
        else:
            assert not locks
            assert_refused(second)
        found, expected = files_of(folder), files_of(Path(small_prepared))
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} <= {"settings.json", "SHA256SUMS"}
        run = tmp_path / f"run, locks {locks}"
        first, second = both(
            locks, "train", tmp_path / "config.toml", "--set", f"out={run}", "--set", f"data.folder={folder}"
        )
        assert first["status"] == 0, first["said"]
        assert_refused(second)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(6))
        assert not check_sums(lists_below(run), run).damaged
        assert not (run / "lease.json").exists()
        converted = tmp_path / f"converted, locks {locks}"
        first, second = both(locks, "convert", run / "hf", converted)
        assert first["status"] == 0
        assert second["status"] == 2
        (line,) = [line for line in second["said"].splitlines() if line.startswith("babel: ")]
        assert any(
            words in line for words in ("is at work in it", "exists already", "appeared", "has just made it")
        )
        assert main(["verify", str(converted)]) == 0
        assert not list(tmp_path.glob(".*lease*"))
    assert main(["verify", str(tmp_path / "run, locks False")]) == 0
