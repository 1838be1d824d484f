"""Spikes: losses and gradient norms far above those of the steps before. A run may skip their updates.

One such update can undo days of training (PaLM, Chowdhery et al. 2022, section 5.1, went back to a checkpoint
and skipped the batches). The rule is that of OLMo 2 (2025, section 3.2): a value is a spike if it is more
than a number of standard deviations above the mean of the last 128 steps. The value of a skipped step counts
among the recent values. So a lasting rise, for example at the start of another mixture, ends the skipping
after a few steps.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

RECENT_STEPS = 128
_FEWEST_STEPS = RECENT_STEPS // 2


def no_recent() -> Float[Array, "2 recent"]:
    """Losses and gradient norms of the last steps, the newest at the end; NaN where there is none yet."""
    return jnp.full((2, RECENT_STEPS), jnp.nan, jnp.float32)


def is_spike(
    values: Float[Array, "2"], recent: Float[Array, "2 recent"], deviations: float
) -> Bool[Array, ""]:
    """True if the loss or the gradient norm is more than `deviations` standard deviations above its mean.
    Always False in the first 64 steps.
    """
    # NaN marks steps that were not there yet.
    known = jnp.isfinite(recent)
    count = jnp.sum(known, axis=1)
    mean = jnp.sum(jnp.where(known, recent, 0.0), axis=1) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(known, jnp.square(recent - mean[:, None]), 0.0), axis=1)
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return jnp.any((values > mean + deviations * deviation) & (count >= _FEWEST_STEPS))


def with_newest(recent: Float[Array, "2 recent"], values: Float[Array, "2"]) -> Float[Array, "2 recent"]:
    """`recent` with the values of one more step. Values that are not finite are left out."""
    moved = jnp.concatenate([recent[:, 1:], values[:, None]], axis=1)
    return jnp.where(jnp.all(jnp.isfinite(values)), moved, recent)
