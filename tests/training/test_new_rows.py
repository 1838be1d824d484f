"""Stages that train the rows of new tokens, and those alone."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from babel_jax.errors import BadInput
from tests.forced_devices import forced_devices

NEW = (3, 700, 701, 1279)
TABLES = ("model/embed_tokens/weight", "lm_head/weight")


def stages(*trained):
    common = {"schedule": {"peak": 1e-2}, "mixture": {"max_epochs": 1000.0}}
    return [
        {"name": f"part{number}", "steps": 3, "train": train, **common}
        for number, train in enumerate(trained)
    ]


@pytest.fixture
def train(train_at):
    """Runs a folder to its end with the second of two layers and some rows as the new ones."""
    return partial(train_at, new_layers=(1,), new_rows=NEW)


def leaves(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep="/")


def test_all_but_the_new_rows_stay_to_the_bit(train, begin, run_config, tmp_path):
    before = leaves(begin(run_config(tmp_path).model.shape))
    for path, leaf in leaves(train(tmp_path, stages=stages("new_rows"))).items():
        if path in TABLES:
            changed = np.flatnonzero((leaf != before[path]).any(axis=1)).tolist()
            # Each row of the head has a gradient; one of the embedding only if a text has the token. Both
            # decay.
            assert changed == list(NEW), path
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)


@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_cut_off_it_goes_on_to_the_same_bits(train, tmp_path, cut_off, stop):
    changes = {"stages": stages("new_rows", "all", "new_rows"), "training": {"checkpoint_every": 2}}
    whole = leaves(train(tmp_path / "whole", **changes))
    cut_off(stop, lambda: train(tmp_path / "cut", **changes))
    again = leaves(train(tmp_path / "cut", **changes))
    for path, leaf in whole.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_a_stage_of_new_rows_needs_some(train, tmp_path):
    with pytest.raises(BadInput, match='train = "new_rows", and the model has no rows of new tokens; add'):
        train(tmp_path, new_rows=(), stages=stages("new_rows"))


@pytest.mark.slow
def test_on_a_mesh_whose_every_axis_is_over_1():
    script = Path(__file__).with_name("sixteen_devices.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=forced_devices(16), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = json.loads(done.stdout)
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(together["tables"], alone["tables"], rtol=1e-4, atol=1e-6)
    for found in (alone, together):
        assert set(found["changed"]) == set(TABLES)
        assert all(rows == [5, 40, 60, 61, 95] for rows in found["changed"].values())
        # Five rows and padding, for both tables and both moments.
        assert found["moments"] == [[128, 32]] * 4
    # Each device has a part of the rows, and of each row.
    for shard in together["shards"]:
        assert shard[0] == 64
        assert shard[1] < 32
