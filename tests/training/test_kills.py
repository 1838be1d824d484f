"""One run, killed 20 times at random moments: its losses are those of an undisturbed one, no batch lost or
repeated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from babel_jax.recipe.recipe import run_recipe
from babel_jax.training.run_state import read_json_lines

KILLS = 20


@pytest.mark.slow
def test_twenty_random_kills(run_config, tmp_path):
    stages = [
        {"name": name, "steps": 200, "schedule": {"peak": 1e-3}, "mixture": {"max_epochs": 100000.0}}
        for name in ("first", "second")
    ]
    config = run_config(
        tmp_path / "undisturbed",
        stages=stages,
        training={"checkpoint_every": 7, "keep_every": 140},
        evaluation={"batch_size": 4, "max_bytes": 300},
    )
    run_recipe(config)
    config.save(tmp_path / "run.toml")
    script = Path(__file__).with_name("killed_run.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "run.toml", tmp_path / "killed", str(KILLS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["status"] == 0, ended.stderr[-3000:]
    # They were spread over the run, and some met a checkpoint that was being written.
    assert len({step for step, _ in found["kills"]}) > KILLS // 4
    assert any(saving for _, saving in found["kills"])
    runs = [
        [
            (line["step"], line["stage"], line["loss"], line["tokens_by_language"])
            for line in read_json_lines(folder / "metrics.jsonl")
        ]
        for folder in (tmp_path / "undisturbed", tmp_path / "killed")
    ]
    assert [step for step, *_ in runs[0]] == list(range(400))
    assert runs[0] == runs[1]
    kept = {
        int(path.name) for path in (tmp_path / "killed" / "checkpoints").iterdir() if path.name.isdecimal()
    }
    assert kept == {140, 280, 399, 400}
