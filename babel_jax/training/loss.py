"""Next-token cross-entropy over packed windows, in float32."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from babel_jax.config import AttentionKernel, ModelConfig, Remat
from babel_jax.model.cross_entropy import target_logits
from babel_jax.model.decoder import hidden_states, output_table
from babel_jax.model.parallel import ALONE, Placement


class WindowLosses(NamedTuple):
    """For each window: the sum of its targets' negative log-likelihoods, in nats, and how many targets it
    has.
    """

    nats: Float[Array, "batch"]
    targets: Int[Array, "batch"]


def target_mask(
    segment_ids: Int[Array, "batch time"], loss_mask: Int[Array, "batch time"] | None = None
) -> Bool[Array, "batch time-1"]:
    """True where the next token belongs to the same document and is no padding; with `loss_mask` only where
    that has 1 for it.
    """
    mask = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return mask if loss_mask is None else mask & (loss_mask[:, 1:] > 0)


def summed_loss(
    config: ModelConfig,
    params: PyTree[Array],
    batch: Mapping[str, Int[Array, "batch time"]],
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = Remat.NONE,
    z_loss: float = 0.0,
    kernel: AttentionKernel = AttentionKernel.XLA,
    placement: Placement = ALONE,
    scan_layers: bool = True,
) -> tuple[Float[Array, ""], WindowLosses]:
    """The sum over all targets of -log p, plus `z_loss` * log(Z)^2 (PaLM, section 5), to be divided by the
    number of targets.

    With a placement, the sums over the targets of this device's part of each window.
    """
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    hidden = hidden_states(
        config, params, tokens, segment_ids=segment_ids, compute_dtype=compute_dtype, remat=remat,
        kernel=kernel, placement=placement,
        scan_layers=scan_layers,
    )  # fmt: skip
    # All positions go through the head and the last is masked: a slice of length T - 1 would break the tiling
    # of the matrix product.
    targets = placement.own_places(jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))))
    mask = placement.own_places(jnp.pad(target_mask(segment_ids, batch.get("loss_mask")), ((0, 0), (0, 1))))
    rows = hidden.reshape(-1, hidden.shape[-1])
    table = output_table(config, params)
    picked, log_z = target_logits(rows, table, targets.reshape(-1), config.final_logit_softcapping, placement)
    picked, log_z = picked.reshape(mask.shape), log_z.reshape(mask.shape)
    nats = jnp.where(mask, log_z - picked, 0.0)
    total = jnp.sum(nats)
    if z_loss:
        total = total + z_loss * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return total, WindowLosses(jnp.sum(nats, axis=1), jnp.sum(mask, axis=1))
