"""What stays float32 when the activations are bfloat16, against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from babel_jax.model.decoder import forward
from babel_jax.model.execution import Execution
from babel_jax.model.flash_attention import flash_attention
from babel_jax.model.layers import RMSNorm, rope_tables, rotate
from babel_jax.model.parameters import bind
from babel_jax.training.loss import summed_loss

HALF_STEP = 2.0**-8  # the largest relative error of rounding to bfloat16 once


def bfloat16(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(ml_dtypes.bfloat16)


def wide(x):
    return np.asarray(x).astype(np.float64)


def test_norms_are_rounded_once(tiny_config):
    x, weight = bfloat16(3, 5, 64, scale=30.0), np.random.default_rng(1).normal(size=64).astype(np.float32)
    found = bind(RMSNorm(64, "embed", tiny_config), {"weight": jnp.asarray(weight)})(jnp.asarray(x))
    expected = wide(x) / np.sqrt(np.mean(wide(x) ** 2, -1, keepdims=True) + tiny_config.rms_norm_eps) * weight
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(found), expected, rtol=1.01 * HALF_STEP)


def test_scores_and_softmax_do_not_pass_through_bfloat16():
    # Scores near 200 differ by less than bfloat16 resolves there (1), which decides among the sources.
    query = bfloat16(1, 4, 2, 16, scale=0.1) + ml_dtypes.bfloat16(14)
    key = bfloat16(1, 4, 1, 16, seed=1, scale=0.05) + ml_dtypes.bfloat16(3.5)
    value = bfloat16(1, 4, 1, 16, seed=2)
    mask = np.tril(np.ones((4, 4), bool))[None]
    found = flash_attention(*map(jnp.asarray, (query, key, value, mask)), query.shape[-1] ** -0.5, None)
    scores = np.einsum("bthd,bsd->bhts", wide(query * ml_dtypes.bfloat16(0.25)), wide(key)[:, :, 0])
    assert 190 < scores.mean() < 210
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bsd->bthd", weights, wide(value)[:, :, 0]).reshape(1, 4, 32)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(found), expected, atol=0.02)


def test_rotation_angles_at_far_positions_are_float32(tiny_config):
    x, positions = bfloat16(1, 3, 2, 16), np.array([[0, 32_000, 131_071]])
    found = rotate(jnp.asarray(x), *rope_tables(tiny_config, jnp.asarray(positions)))
    angles = positions[0][:, None] * tiny_config.rope_theta ** (-np.arange(0, 16, 2) / 16)
    first, second = np.split(wide(x), 2, -1)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    np.testing.assert_allclose(wide(found), expected, atol=0.03)


def test_logits_and_loss_are_float32_and_close(tiny_config, tiny_params):
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, tiny_config.vocab_size, (2, 48), dtype=np.int32))
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    exact = forward(tiny_config, tiny_params, tokens)
    rounded = jax.jit(forward, static_argnums=0, static_argnames="execution")(
        tiny_config, tiny_params, tokens, execution=Execution(jnp.bfloat16)
    )
    assert rounded.dtype == jnp.float32
    assert not np.array_equal(np.asarray(rounded).astype(ml_dtypes.bfloat16), np.asarray(rounded))
    np.testing.assert_allclose(rounded, exact, atol=0.05 * np.abs(exact).max())
    (loss, windows), (half, _) = (
        summed_loss(tiny_config, tiny_params, batch, execution=Execution(dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32
    assert windows.nats.dtype == jnp.float32
    assert abs(float(half) / float(loss) - 1) < 1e-3
