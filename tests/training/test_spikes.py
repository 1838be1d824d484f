"""Updates that are far outside of those before are left out, and chips that compute other bits are named."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from babel_jax.errors import BadInput
from babel_jax.training import corruption, run_state
from babel_jax.training.corruption import BitChecks, refuse_without_determinism
from babel_jax.training.deepening import Depth
from babel_jax.training.mesh import make_mesh
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import read_json_lines
from babel_jax.training.spikes import RECENT_STEPS, is_spike, no_recent, with_newest


def after(values):
    recent = no_recent()
    for value in values:
        recent = with_newest(recent, jnp.asarray(value, jnp.float32))
    return recent


NOISE = np.random.default_rng(0).normal([3.0, 1.0], [0.1, 0.2], (RECENT_STEPS, 2))


def test_the_rule_is_that_of_plain_numpy():
    recent = after(NOISE)
    loss, norm = NOISE.mean(axis=0) + 6 * NOISE.std(axis=0, ddof=1)
    for values, spike in [
        ((loss + 1e-3, 1.0), True),
        ((loss - 1e-3, 1.0), False),
        ((3.0, norm + 1e-3), True),
        ((3.0, norm - 1e-3), False),
        ((-9.0, 0.0), False),  # far below is no harm
    ]:
        assert bool(is_spike(jnp.asarray(values, jnp.float32), recent, 6.0)) == spike, values


def test_the_first_steps_are_never_left_out():
    high = jnp.asarray([100.0, 100.0])
    assert not is_spike(high, no_recent(), 6.0)
    assert not is_spike(high, after(NOISE[: RECENT_STEPS // 2 - 1]), 6.0)
    assert is_spike(high, after(NOISE[: RECENT_STEPS // 2]), 6.0)


def test_values_that_are_not_finite_are_not_among_the_recent():
    assert np.array_equal(after([*NOISE, (np.nan, 1.0), (3.0, np.inf)]), after(NOISE))


def test_a_lasting_rise_is_followed():
    recent, left_out = after(NOISE), 0
    for _ in range(20):
        value = jnp.asarray([5.0, 1.0])
        left_out += bool(is_spike(value, recent, 6.0))
        recent = with_newest(recent, value)
    assert 0 < left_out < 10
    assert not is_spike(value, recent, 6.0)


def test_a_spike_leaves_the_parameters_as_they_are_and_is_counted(run_config, begin, tmp_path, monkeypatch):
    """From the fourth step on, every update is far outside: it changes nothing, and after three the run stops
    as it does for NaN.
    """
    monkeypatch.setattr(
        "babel_jax.training.step.is_spike",
        lambda _, recent, deviations: jnp.sum(jnp.isfinite(recent[0])) >= 3,
    )
    config = run_config(tmp_path, training={"skip_spikes": 6.0, "recheck_every": 2})
    model = [Depth(0, config.model.shape, ())]
    with pytest.raises(
        BadInput,
        match=(
            "was not finite, or more than 6 deviations above those before, for 3 steps in a row, up to step 6"
        ),
    ):
        train_stages(config, model, lambda: begin(config.model.shape), tmp_path, lambda *_: None)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 2, 3]
    saved = [
        ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / str(step) / "default")["params"][
            "model"
        ]["norm"]["weight"]
        for step in (3, 6)
    ]
    assert np.array_equal(*saved)


def test_a_checkpoint_of_an_earlier_version_is_read(run_config, begin, tmp_path, monkeypatch):
    """Those have no recent losses."""
    config = run_config(tmp_path)
    model = [Depth(0, config.model.shape, ())]

    def train():
        return train_stages(config, model, lambda: begin(config.model.shape), tmp_path, lambda *_: None)

    with monkeypatch.context() as patch:
        patch.setattr(run_state.Checkpoints, "save", earlier_save)
        whole = train()
    shutil.rmtree(tmp_path / "checkpoints" / "10")
    assert "recent" not in ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / "9" / "default")
    resumed = train()
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, resumed))


def earlier_save(self, step, state, stage, save=run_state.Checkpoints.save):
    fields = {name: leaf for name, leaf in vars(state).items() if name != "recent"}
    save(self, step, SimpleNamespace(**fields), stage)


def test_a_run_checks_its_gradients_every_so_many_steps_and_replicas_before_each_checkpoint(
    run_config, begin, tmp_path, monkeypatch
):
    gradients, replicas = [], []
    monkeypatch.setattr(
        BitChecks,
        "check_gradients",
        lambda self, step, params, batch: gradients.append((step, batch["tokens"].shape)),
    )
    monkeypatch.setattr(BitChecks, "check_replicas", lambda self, step, params: replicas.append(step))
    config = run_config(tmp_path, training={"recheck_every": 4})
    train_stages(
        config,
        [Depth(0, config.model.shape, ())],
        lambda: begin(config.model.shape),
        tmp_path,
        lambda *_: None,
    )
    assert gradients == [(3, (4, 64)), (7, (4, 64))]
    assert replicas == [3, 6, 9, 10]


@pytest.fixture
def checks(tiny_config):
    made = BitChecks.__new__(BitChecks)
    made._mesh = make_mesh({})
    return made


def test_gradients_that_differ_name_the_host(checks, monkeypatch):
    answers = [np.zeros((1, 3), np.uint32), np.asarray([[0, 1, 0]], np.uint32)]
    checks.of_gradients = lambda *_: answers.pop()
    monkeypatch.setattr(corruption.socket, "gethostname", lambda: "host-17")
    with pytest.raises(
        BadInput, match=r"step 4: .* differ on host host-17 \(devices 0\): a chip computes wrong numbers"
    ):
        checks.check_gradients(4, {}, {})


def test_of_several_replicas_the_one_that_differs_is_named():
    assert corruption._minority(np.asarray([5, 5, 6]), np.asarray([0, 4, 8])) == {8}
    assert corruption._minority(np.asarray([5, 6]), np.asarray([0, 4])) == {0, 4}
    assert corruption._minority(np.asarray([5, 5]), np.asarray([0, 4])) == set()


def test_one_bit_changes_the_checksum():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    other = values.copy()
    other.view(np.uint32)[7] ^= 1
    assert corruption._checksum(jnp.asarray(values)) != corruption._checksum(jnp.asarray(other))
    assert corruption._checksum(jnp.asarray(values)) == np.sum(values.view(np.uint32), dtype=np.uint32)


def test_gpus_need_sums_in_a_fixed_order():
    with pytest.raises(BadInput, match="XLA_FLAGS=--xla_gpu_deterministic_ops=true"):
        refuse_without_determinism("gpu", "")
    refuse_without_determinism("gpu", "--a --xla_gpu_deterministic_ops=true")
    refuse_without_determinism("tpu", "")
