"""Spikes: losses and gradient norms far outside those of the steps before, whose updates a run may leave out.

One such update can undo days of training (PaLM, Chowdhery et al. 2022, section 5.1, went back to a checkpoint
and skipped the batches). The rule is that of OLMo 2 (2025, section 3.2): a value more than so many standard
deviations above the mean of the last 128 steps. A value that is left out still counts among the recent ones,
so that a lasting rise, as where another mixture begins, is followed after a few steps.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

RECENT_STEPS = 128
_FEWEST_STEPS = RECENT_STEPS // 2


def no_recent() -> Float[Array, "2 recent"]:
    """The losses and the gradient norms of the last steps, the newest at the end: none yet, which is NaN."""
    return jnp.full((2, RECENT_STEPS), jnp.nan, jnp.float32)


def is_spike(
    values: Float[Array, "2"], recent: Float[Array, "2 recent"], deviations: float
) -> Bool[Array, ""]:
    """Whether the loss or the gradient norm is more than so many standard deviations above its mean; False
    for the first 64 steps.
    """
    known = jnp.isfinite(recent)
    count = jnp.sum(known, axis=1)
    mean = jnp.sum(jnp.where(known, recent, 0.0), axis=1) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(known, jnp.square(recent - mean[:, None]), 0.0), axis=1)
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return jnp.any((values > mean + deviations * deviation) & (count >= _FEWEST_STEPS))


def with_newest(recent: Float[Array, "2 recent"], values: Float[Array, "2"]) -> Float[Array, "2 recent"]:
    """The recent values with those of one step more; values that are not finite are left out."""
    moved = jnp.concatenate([recent[:, 1:], values[:, None]], axis=1)
    return jnp.where(jnp.all(jnp.isfinite(values)), moved, recent)
