"""Noise in NumPy against the same noise in JAX, to the bit."""

import ml_dtypes
import numpy as np
import pytest

from babel_jax.config import ExpansionSettings, Init
from babel_jax.expansion.apply import changed_rows
from babel_jax.expansion.noise import is_exact_in_numpy, noise_table, noisy_rows, path_hash
from babel_jax.expansion.plan import plan_from_settings

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EVERY = np.arange(2**16, dtype=np.uint16)  # NaNs, infinities and denormals are among these values
PLACE, TARGET = ("layers", "mlp", "down_proj", "kernel"), 2


def drawn(count):
    """Random float32 of every kind, and the smallest denormals."""
    bits = np.random.default_rng(0).integers(0, 2**32, count, np.uint32)
    return np.concatenate([bits, np.arange(1000, dtype=np.uint32)]).view(np.float32)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize(
    ("rows", "first"),
    [
        # More numbers than a block has, a width that no power of two divides, vectors, later rows.
        (EVERY.view(BFLOAT16).reshape(64, 1024), 0),
        (EVERY.view(BFLOAT16), 5),
        (EVERY.view(np.float16).reshape(1024, 64), 2**20),
        (drawn(2 * 2**16).reshape(-1, 3 * 8), 7),
        (drawn(2**17 - 1000).reshape(2, -1), 0),
    ],
)
def test_numpy_has_the_bits_of_jax(seed, rows, first):
    settings = ExpansionSettings(
        insert_after=(1,), init=Init.NOISE, noise_mean=1e-4, noise_std=0.02, seed=seed
    )
    plan = plan_from_settings(settings, 3)
    assert plan.new_layers == (TARGET,)
    table = noise_table(1e-4, 0.02)
    assert is_exact_in_numpy(table, rows.dtype)
    ours = noisy_rows(rows, seed, path_hash(PLACE), TARGET, table, first)
    theirs = changed_rows(plan, PLACE, TARGET, rows, first, lambda: rows)
    assert (ours.dtype, ours.shape) == (rows.dtype, rows.shape)
    assert ours.tobytes() == theirs.tobytes()
    assert ours.tobytes() != rows.tobytes()
    # A piece has the noise of the whole.
    assert (
        noisy_rows(rows[1:], seed, path_hash(PLACE), TARGET, table, first + 1).tobytes() == ours[1:].tobytes()
    )


@pytest.mark.parametrize(
    ("mean", "std", "dtype"),
    [(0.0, 0.0, BFLOAT16), (0.0, 1e-34, np.float32), (1e-33, 0.0, np.float32), (0.0, 1.0, np.float64)],
)
def test_noise_that_meets_denormals_is_left_to_jax(mean, std, dtype):
    assert not is_exact_in_numpy(noise_table(mean, std), np.dtype(dtype))
