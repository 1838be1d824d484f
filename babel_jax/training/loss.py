"""Next-token cross-entropy over packed windows, in float32."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from babel_jax.config import ModelConfig, Remat
from babel_jax.model.decoder import hidden_states, unembed


class WindowLosses(NamedTuple):
    """For each window: the sum of its targets' negative log-likelihoods, in nats, and how many targets it has."""

    nats: Float[Array, "batch"]
    targets: Int[Array, "batch"]


def target_mask(segment_ids: Int[Array, "batch time"], loss_mask: Int[Array, "batch time"] | None = None) -> Bool[Array, "batch time-1"]:
    """True where the next token belongs to the same document and is no padding; with `loss_mask` only where that has 1 for it."""
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return mask if loss_mask is None else mask & (loss_mask[:, 1:] > 0)


def summed_loss(
    config: ModelConfig,
    params: PyTree[Array],
    batch: Mapping[str, Int[Array, "batch time"]],
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = Remat.NONE,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], WindowLosses]:
    """The sum over all targets of -log p, plus `z_loss` * log(Z)^2 (PaLM, section 5), to be divided by the number of targets."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden = hidden_states(config, params, tokens, segment_ids=segment_ids, compute_dtype=compute_dtype, remat=remat)
    # All positions go through the head and the last is masked: a slice of length T - 1 would break the tiling of the matrix product.
    logits = unembed(config, params, hidden, compute_dtype)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    mask = jnp.pad(target_mask(segment_ids, batch.get("loss_mask")), ((0, 0), (0, 1)))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = jnp.where(mask, log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], 0.0)
    total = jnp.sum(nats)
    if z_loss:
        total = total + z_loss * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return total, WindowLosses(jnp.sum(nats, axis=1), jnp.sum(mask, axis=1))
