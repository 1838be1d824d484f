"""A disk that fails, and a process that ends, at the n-th rename, link or sync: nothing is half-written, and
the same command goes on.
"""

import errno
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from babel_jax.config import Config
from babel_jax.config.file import parse_settings
from babel_jax.data.windows.prepare import prepare
from babel_jax.digests import check_sums, lists_below
from babel_jax.disk_errors import explain_os_errors
from babel_jax.errors import BadInput
from babel_jax.model.decoder import init_params
from babel_jax.recipe.recipe import run_recipe
from babel_jax.training.deepening import Depth
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import newest_step, read_json_lines
from babel_jax.training.saved_steps import check_state, noted_in

_spec = importlib.util.spec_from_file_location("faults", Path(__file__).with_name("faults.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
Killed, faults = _module.Killed, _module.faults

KINDS = {"no space": errno.ENOSPC, "disk error": errno.EIO, "killed": None}
# Both kinds of errors take the same way.
CASES = ["no space", "killed", pytest.param("disk error", marks=pytest.mark.slow)]


def assert_nothing_half_written(folder):
    """What has its final name is whole."""
    lists = [
        path
        for path in lists_below(folder)
        if ".partial" not in str(path) and "orbax-checkpoint-tmp" not in str(path)
    ]
    assert not check_sums(lists, folder).damaged
    for step in folder.glob("checkpoints/*"):
        if step.name.isdecimal():
            noted_in(step)
            assert not check_state(step).damaged
    for path in folder.rglob("*.json"):
        if (
            ".partial" not in str(path)
            and "compiled" not in path.parts
            and "orbax-checkpoint-tmp" not in str(path)
        ):
            json.loads(path.read_text())


def fails_or_ends(run, number, at):
    """Runs until the fault; gives whether there was one: threads of libraries may have fewer changes the next
    time.
    """
    try:
        run()
    except Killed:
        assert number is None
    except BadInput as problem:
        told = str(problem)
    else:
        return False
    if number is not None:
        said = "no space left on the disk" if number == errno.ENOSPC else "the disk or its connection failed"
        assert said in told, at
    return True


def contents(folder):
    """Files and their bytes, and empty folders, without lists of digests and settings
    (they name the folder).
    """
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.name not in ("SHA256SUMS", "settings.json")
    }


@pytest.mark.parametrize("kind", CASES)
def test_prepare(small_settings, small_model, small_prepared, tmp_path, monkeypatch, kind):
    def run(folder):
        return prepare(small_settings.model_copy(update={"folder": str(folder)}), small_model)

    with faults(monkeypatch) as counted:
        expected = run(tmp_path / "undisturbed")
    before = contents(tmp_path / "undisturbed")
    assert counted.count > 20
    for at in [*range(1, counted.count, 17), *range(counted.count - 6, counted.count + 1, 2)]:
        folder = tmp_path / str(at)
        with faults(monkeypatch, at, KINDS[kind]):
            assert fails_or_ends(lambda folder=folder: run(folder), KINDS[kind], at)
        if folder.is_dir():
            assert_nothing_half_written(folder)
        assert run(folder) == expected
        assert contents(folder) == before, at


@pytest.fixture(scope="module")
def train(small_prepared, small_model):
    shape = {
        "vocab_size": 1280,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    stage = {"name": "only", "steps": 5, "schedule": {"peak": 1e-2}, "mixture": {"max_epochs": 1000.0}}

    def run(folder):
        values = {
            "out": str(folder),
            "model": {"shape": shape},
            "data": {"folder": str(small_prepared), "tokenizer": str(small_model), "seq_len": 64},
            "training": {"global_batch_size": 4, "compute_dtype": "float32", "checkpoint_every": 2},
            "stages": [stage],
        }
        config = parse_settings(Config, values, "test")
        folder.mkdir(exist_ok=True)
        first = jax.jit(init_params, static_argnums=0)(config.model.shape, jax.random.key(0))
        with explain_os_errors(folder):  # as the command does
            return jax.device_get(
                train_stages(
                    config, [Depth(0, config.model.shape, ())], lambda: first, folder, lambda *_: None
                )
            )

    return run


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_json_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", CASES)
def test_train(train, tmp_path, monkeypatch, kind):
    with faults(monkeypatch) as counted:
        params = train(tmp_path / "undisturbed")
    expected = losses(tmp_path / "undisturbed")
    met = 0
    for at in np.linspace(1, counted.count, 4).astype(int).tolist():
        folder = tmp_path / str(at)
        with faults(monkeypatch, at, KINDS[kind]):
            met += fails_or_ends(lambda folder=folder: train(folder), KINDS[kind], at)
        assert_nothing_half_written(folder)
        again = train(folder)
        assert losses(folder) == expected, at
        assert newest_step(folder / "checkpoints") == 5
        jax.tree.map(np.testing.assert_array_equal, again, params)
    assert met >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_the_whole_recipe(recipe_config, small_settings, small_model, base, tmp_path, monkeypatch, kind):
    """From expansion to the report, a fault at every 25th change."""

    def run(folder):
        changes = {
            "expansion": {"insert_after": [1], "init": "zero"},
            "evaluation": {"batch_size": 4, "max_bytes": 500, "every": 3},
        }
        return run_recipe(
            recipe_config(folder, small_settings, small_model, {"folder": base["hf"]}, **changes)
        )

    with faults(monkeypatch) as counted:
        expected = run(tmp_path / "undisturbed")
    for at in range(1, counted.count, 25):
        folder = tmp_path / str(at)
        with faults(monkeypatch, at, KINDS[kind]):
            fails_or_ends(lambda folder=folder: run(folder), KINDS[kind], at)
        assert_nothing_half_written(folder)
        again = run(folder)
        assert again["bits_per_byte"] == expected["bits_per_byte"], at
        assert losses(folder) == losses(tmp_path / "undisturbed"), at
