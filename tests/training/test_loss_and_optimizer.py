"""Loss, AdamW and schedules against torch and plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from babel_jax.config import (
    ComputeType,
    OptimizerRule,
    OptimizerSettings,
    Schedule,
    ScheduleKind,
    TrainingSettings,
)
from babel_jax.errors import BadInput
from babel_jax.model.decoder import abstract_params, forward
from babel_jax.training.loss import summed_loss
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW, learning_rate, rule_of_each
from babel_jax.training.step import compiled_step, initial_state, state_shardings

FLOAT32 = {"compute_dtype": ComputeType.FLOAT32}


def packed_batch(rows=4, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [(20, 30, 14), (50, 10), (64,), (5, 5, 30, 20)]
    segment_ids = np.zeros((rows, 64), np.int32)
    for row in range(rows):
        segments = np.repeat(np.arange(len(lengths[row])) + 1, lengths[row])
        segment_ids[row, : len(segments)] = segments
    tokens = np.where(segment_ids > 0, rng.integers(1, 512, (rows, 64)), 0).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "language": np.arange(rows, dtype=np.int32) % 3}


def run_steps(config, params, batches, settings=None, training=None, rate=1e-3):
    """The states and metrics after each step, starting from a copy of `params`."""
    settings, training = settings or OptimizerSettings(), training or TrainingSettings(**FLOAT32)
    mesh = make_mesh({})
    optimizer = AdamW(settings, abstract_params(config))
    state = jax.device_put(
        initial_state(optimizer, jax.tree.map(jnp.copy, params), 3), state_shardings(config, optimizer, mesh)
    )
    step = compiled_step(config, optimizer, settings, training, mesh)
    found = []
    for batch in batches:
        state, metrics = step(state, global_batch(batch, mesh), jnp.float32(rate))
        found.append((jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, metrics)))
    assert step._cache_size() == 1
    return found


def test_the_loss_is_the_cross_entropy_of_targets_inside_their_document(tiny_config, tiny_params):
    batch = jax.tree.map(jnp.asarray, packed_batch())
    total, windows = summed_loss(tiny_config, tiny_params, batch)
    logits = np.asarray(
        forward(tiny_config, tiny_params, batch["tokens"], segment_ids=batch["segment_ids"]), np.float64
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected, counts = np.zeros(4), np.zeros(4)
    for row in range(4):
        for place in range(63):
            segment = batch["segment_ids"][row, place]
            if segment and segment == batch["segment_ids"][row, place + 1]:
                expected[row] -= log_p[row, place, batch["tokens"][row, place + 1]]
                counts[row] += 1
    np.testing.assert_allclose(windows.nats, expected, rtol=1e-5)
    np.testing.assert_array_equal(windows.targets, counts)
    assert float(total) == pytest.approx(expected.sum(), rel=1e-5)


def test_z_loss_adds_the_squared_log_of_the_normalizer(tiny_config, tiny_params):
    batch = packed_batch(rows=3)  # the third window is one whole document
    batch = {name: jnp.asarray(rows[2:]) for name, rows in batch.items()}
    plain, _ = summed_loss(tiny_config, tiny_params, batch)
    with_z, _ = summed_loss(tiny_config, tiny_params, batch, z_loss=0.01)
    log_z = jax.nn.logsumexp(forward(tiny_config, tiny_params, batch["tokens"]), axis=-1)[:, :-1]
    assert float(with_z - plain) == pytest.approx(0.01 * float(jnp.sum(log_z**2)), rel=1e-3)


def test_five_steps_equal_those_of_torch(tiny_config, tiny_params):
    torch = pytest.importorskip("torch")
    batches = [packed_batch(seed=seed) for seed in range(5)]
    settings = OptimizerSettings(clip_norm=0.5)
    found = run_steps(tiny_config, tiny_params, batches, settings)

    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, tiny_params), sep="/")
    ours = {path: torch.nn.Parameter(torch.tensor(leaf)) for path, leaf in flat.items()}
    matrices = [leaf for path, leaf in ours.items() if "norm" not in path and "bias" not in path]
    vectors = [leaf for path, leaf in ours.items() if "norm" in path or "bias" in path]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    gradient_of = jax.jit(
        jax.grad(
            lambda params, batch: (lambda total, windows: total / windows.targets.sum())(
                *summed_loss(tiny_config, params, batch)
            )
        )
    )
    for batch, (state, metrics) in zip(batches, found, strict=True):
        params = traverse_util.unflatten_dict(
            {path: leaf.detach().numpy() for path, leaf in ours.items()}, sep="/"
        )
        for path, gradient in traverse_util.flatten_dict(gradient_of(params, batch), sep="/").items():
            ours[path].grad = torch.tensor(np.asarray(gradient))
        norm = torch.nn.utils.clip_grad_norm_(list(ours.values()), 0.5)
        assert float(metrics["gradient_norm"]) == pytest.approx(float(norm), rel=1e-4)
        peer.step()
        for path, leaf in traverse_util.flatten_dict(state.params, sep="/").items():
            # The key bias moves no attention weight: its gradient is rounding alone, which Adam blows up to
            # full steps.
            if "k_proj/bias" not in path:
                expected = ours[path].detach().numpy()
                assert np.linalg.norm(leaf - expected) < 1e-3 * np.linalg.norm(expected - flat[path]), path


def test_accumulated_gradients_equal_those_of_the_whole_batch(tiny_config, tiny_params):
    batches = [packed_batch(seed=seed) for seed in range(2)]
    whole = run_steps(tiny_config, tiny_params, batches)
    parts = run_steps(
        tiny_config, tiny_params, batches, training=TrainingSettings(gradient_accumulation=4, **FLOAT32)
    )
    for (_, expected), (_, metrics) in zip(whole, parts, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_frozen_parameters_keep_their_bits_and_have_no_moments(tiny_config, tiny_params):
    settings = OptimizerSettings(
        rules=(OptimizerRule(pattern="self_attn", freeze=True), OptimizerRule(pattern=".*"))
    )
    state, _ = run_steps(tiny_config, tiny_params, [packed_batch()], settings)[0]
    before = traverse_util.flatten_dict(tiny_params, sep="/")
    for path, leaf in traverse_util.flatten_dict(state.params, sep="/").items():
        assert np.array_equal(leaf, before[path]) == ("self_attn" in path), path
    trained = [path for path in before if "self_attn" not in path]
    assert len(jax.tree.leaves(state.opt_state)) == 2 * len(trained) + 1


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_config, tiny_params):
    broken = jax.tree.map(jnp.copy, tiny_params)
    broken["model"]["norm"]["weight"] = broken["model"]["norm"]["weight"].at[0].set(jnp.nan)
    (first, _), (second, metrics) = run_steps(tiny_config, broken, [packed_batch(), packed_batch()])
    assert (int(first.skipped), int(metrics["skipped"])) == (1, 2)
    kept = [(state.params, state.opt_state) for state in (first, second)]
    for before, after in zip(*map(jax.tree.leaves, kept), strict=True):
        np.testing.assert_array_equal(before, after)
    for before, after in zip(jax.tree.leaves(broken), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(before, after)


def test_bfloat16_compute_keeps_float32_parameters_and_moments(tiny_config, tiny_params):
    state, metrics = run_steps(tiny_config, tiny_params, [packed_batch()], training=TrainingSettings())[0]
    floats = [leaf for leaf in jax.tree.leaves(state) if np.issubdtype(leaf.dtype, np.floating)]
    assert {leaf.dtype for leaf in floats} == {np.dtype(np.float32)}
    assert np.isfinite(metrics["loss"])


def test_a_bfloat16_first_moment_changes_the_update_by_its_rounding_alone(tiny_config, tiny_params):
    batches = [packed_batch(seed=seed) for seed in range(2)]
    whole, _ = run_steps(tiny_config, tiny_params, batches)[-1]
    short, _ = run_steps(
        tiny_config, tiny_params, batches, OptimizerSettings(first_moment=ComputeType.BFLOAT16)
    )[-1]
    moments = short.opt_state.inner_state
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {np.dtype(np.float32)}
    for one, other, before in zip(
        *(jax.tree.leaves(tree.params) for tree in (whole, short)),
        jax.tree.leaves(tiny_params),
        strict=True,
    ):
        assert np.linalg.norm(one - other) <= 2**-7 * np.linalg.norm(one - np.asarray(before))


def test_every_parameter_needs_a_rule_and_the_first_one_wins(tiny_config):
    params = abstract_params(tiny_config)
    rules = (
        OptimizerRule(pattern="bias", rate=2.0),
        OptimizerRule(pattern="q_proj", rate=3.0),
        OptimizerRule(pattern="layers|norm"),
    )
    with pytest.raises(BadInput, match=r"none matches the parameter (lm_head|model/embed_tokens)/weight"):
        rule_of_each(OptimizerSettings(rules=rules), params)
    found = traverse_util.flatten_dict(
        rule_of_each(OptimizerSettings(rules=(*rules, OptimizerRule(pattern="."))), params), sep="/"
    )
    assert found["model/layers/self_attn/q_proj/bias"].rate == 2.0
    assert found["model/layers/self_attn/q_proj/weight"].rate == 3.0
    assert found["model/norm/weight"].rate == 1.0


def test_schedules_rise_stay_and_fall():
    wsd = [
        learning_rate(
            Schedule(kind=ScheduleKind.WSD, peak=1.0, warmup_fraction=0.1, decay_fraction=0.2), step, 100
        )
        for step in range(100)
    ]
    np.testing.assert_allclose(wsd[:10], np.arange(1, 11) / 10)
    assert set(wsd[10:80]) == {1.0}
    np.testing.assert_allclose(wsd[80:], 1.0 - 0.9 * np.arange(1, 21) / 20)
    cosine = [
        learning_rate(Schedule(kind=ScheduleKind.COSINE, peak=2.0, warmup_fraction=0.0), step, 100)
        for step in range(100)
    ]
    np.testing.assert_allclose(cosine, 0.2 + 1.8 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2)
    assert learning_rate(Schedule(kind=ScheduleKind.CONSTANT, peak=3.0, warmup_fraction=0.0), 99, 100) == 3.0


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="does not fit 1 devices"):
        make_mesh({"fsdp": 3})
    with pytest.raises(BadInput, match="unknown axis fdsp; valid axes: data, fsdp, ring, context, tensor"):
        make_mesh({"fdsp": 1})
