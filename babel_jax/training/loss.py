"""Next-token cross-entropy over packed windows, in float32."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from babel_jax.config import ModelConfig
from babel_jax.model.cross_entropy import target_logits
from babel_jax.model.decoder import hidden_states, output_table
from babel_jax.model.execution import PLAIN, Execution


class WindowLosses(NamedTuple):
    """For each window: the sum of -log p over its targets, in nats, and the number of its targets."""

    nats: Float[Array, "batch"]
    targets: Int[Array, "batch"]


def target_mask(
    segment_ids: Int[Array, "batch time"], loss_mask: Int[Array, "batch time"] | None = None
) -> Bool[Array, "batch time-1"]:
    """True where the next token is of the same document and no padding; with `loss_mask` only where the mask
    is 1 for the next token.
    """
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return mask if loss_mask is None else mask & (loss_mask[:, 1:] > 0)


def summed_loss(
    config: ModelConfig,
    params: PyTree[Array],
    batch: Mapping[str, Int[Array, "batch ..."]],
    z_loss: float = 0.0,
    execution: Execution = PLAIN,
) -> tuple[Float[Array, ""], WindowLosses]:
    """The sum over all targets of -log p + `z_loss` * log(Z)^2 (PaLM, section 5). The caller divides by the
    number of targets.

    `batch` has tokens and segment_ids, [batch, time], and may have loss_mask, of the same shape.
    On a mesh: the sum over the targets of this device's part of each window.
    """
    tokens, segment_ids, parallel = batch["tokens"], batch["segment_ids"], execution.parallel
    hidden = hidden_states(config, params, tokens, segment_ids=segment_ids, execution=execution)
    # All positions go through the head, and the last one is masked: a slice of length T - 1 would break the
    # tiling of the matrix product.
    targets = parallel.sequence_shard(jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))))
    mask = parallel.sequence_shard(
        jnp.pad(target_mask(segment_ids, batch.get("loss_mask")), ((0, 0), (0, 1)))
    )
    # One row for each token of all windows: the head is one matrix product.
    rows = hidden.reshape(-1, hidden.shape[-1])
    table = output_table(config, params)
    picked, log_z = target_logits(rows, table, targets.reshape(-1), config.final_logit_softcapping, parallel)
    picked, log_z = picked.reshape(mask.shape), log_z.reshape(mask.shape)
    # `where`, and not a product with the mask: a masked infinity would become NaN.
    nats = jnp.where(mask, log_z - picked, 0.0)
    total = jnp.sum(nats)
    if z_loss:
        total = total + z_loss * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return total, WindowLosses(jnp.sum(nats, axis=1), jnp.sum(mask, axis=1))
