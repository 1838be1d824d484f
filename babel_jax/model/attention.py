"""Grouped-query attention (Ainslie et al. 2023) with a key-value cache, and who may see whom."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from babel_jax.config import ModelConfig
from babel_jax.model.cache import Cache
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.execution import PLAIN, Execution
from babel_jax.model.flash_attention import flash_attention
from babel_jax.model.layers import Linear, RMSNorm, rotate
from babel_jax.model.parallel import SINGLE_DEVICE, Parallelism

# Attention with its masks bound: (index of the layer's window among the distinct windows, query, key, value)
# to the output, [batch time heads*head_dim].
AttentionFn = Callable[[Int[Array, ""], Array, Array, Array], Float[Array, "batch time size"]]


def positions_of(segment_ids: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Positions that count from the start of each segment, from 0; padding (segment 0) is at position 0."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    # A segment starts where the id changes; -1 is no id, so the first token always starts one.
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return jnp.where(segment_ids == 0, 0, index - start)


def visible(
    distance: Int[Array, "*#batch time source"],
    allowed: Bool[Array, "#batch #time source"] | None,
    windows: tuple[int | None, ...],
) -> Bool[Array, "windows #batch time source"]:
    """For each window, True where the token at `time` may attend to the one at `source`.

    `distance`: how far the source is before the token. In packed rows it counts indices of the row, as in
    transformers; in prefix trees it counts tokens along the branch. `allowed`: True where both are of one
    segment, or the source is on the token's branch. A token sees itself and the `window - 1` tokens before
    it, or all tokens before it for None.
    """
    # One mask for each distinct window: layers with the same window share it.
    causal = (distance >= 0)[None] if allowed is None else (distance >= 0) & allowed
    return jnp.stack([causal if window is None else causal & (distance < window) for window in windows])


def masks(
    segment_ids: Int[Array, "batch source"] | None,
    source: int,
    windows: tuple[int | None, ...],
    parallel: Parallelism = SINGLE_DEVICE,
) -> Bool[Array, "windows #batch time source"]:
    """`visible` for whole sequences, or for this device's part of each.

    Padding is a segment of its own. So each token sees at least one token, as `flash_attention` needs.
    """
    keys = jnp.arange(source, dtype=jnp.int32)
    queries = parallel.sequence_shard(keys[None])[0]
    same = (
        None
        if segment_ids is None
        else parallel.sequence_shard(segment_ids)[:, :, None] == segment_ids[:, None, :]
    )
    return visible(queries[:, None] - keys[None, :], same, windows)


def tree_masks(
    ends: Int[Array, "batch source"],
    positions: Int[Array, "batch source"],
    windows: tuple[int | None, ...],
    parallel: Parallelism = SINGLE_DEVICE,
) -> Bool[Array, "windows batch time source"]:
    """`visible` for rows that hold prefix trees, written depth first; or for this device's part of each row.

    The tokens below the one at index j are at j + 1 to ends[j] - 1. A token sees itself and the tokens above
    it. Distances are counted along the branch, in positions.
    """
    keys = jnp.arange(ends.shape[1], dtype=jnp.int32)
    queries = parallel.sequence_shard(keys[None])[0]
    above = (queries[None, :, None] >= keys[None, None, :]) & (queries[None, :, None] < ends[:, None, :])
    return visible(parallel.sequence_shard(positions)[:, :, None] - positions[:, None, :], above, windows)


def masked(
    window_masks: Bool[Array, "windows #batch time source"],
    attention: Callable[[Array, Array, Array, Array], Array],
) -> AttentionFn:
    """`attention`, called with the mask of the layer's window."""

    def with_mask(which: Int[Array, ""], query: Array, key: Array, value: Array) -> Array:
        # A model with one window reads its mask without a gather in the scan over layers.
        mask = window_masks[0] if window_masks.shape[0] == 1 else window_masks[which]
        return attention(query, key, value, mask)

    return with_mask


def attention_by_masks(
    config: ModelConfig, window_masks: Bool[Array, "windows #batch time source"]
) -> AttentionFn:
    """`flash_attention` with the mask of the layer's window."""
    scale, softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
    return masked(
        window_masks, lambda query, key, value, mask: flash_attention(query, key, value, mask, scale, softcap)
    )


class Attention(nnx.Module):
    """Projections to queries, keys and values, their norms in each head (Qwen3), rotary positions, attention,
    and the projection back.
    """

    def __init__(self, config: ModelConfig):
        hidden, std = config.hidden_size, config.initializer_range
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query_size, ("q_heads", "embed"), config.qkv_bias, std)
        self.k_proj = Linear(hidden, key_size, ("kv_heads", "embed"), config.qkv_bias, std)
        self.v_proj = Linear(hidden, key_size, ("kv_heads", "embed"), config.qkv_bias, std)
        self.o_proj = Linear(query_size, hidden, ("embed", "q_heads"), config.o_bias, std)
        self.head_dim = config.head_dim
        self.has_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, None, config)
            self.k_norm = RMSNorm(config.head_dim, None, config)

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        rope: tuple[Float[Array, "#batch time half"], ...],
        attention_fn: AttentionFn,
        which: Int[Array, ""],
        layer: Int[Array, ""],
        cache: Cache | None = None,
        execution: Execution = PLAIN,
    ) -> tuple[Float[Array, "batch time embed"], Cache | None]:
        """The output of attention. With a cache, keys and values are first written into its `layer`, and
        attention is over all keys that the cache holds.
        """
        # Each device of the tensor axis has its own heads of all three projections.
        parallel = execution.parallel
        x = parallel.column_parallel_input(x)
        query, key, value = (
            self._heads(projection(x, execution)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Qwen3 norms each head before the rotation, so the norm's scale is the same at each position.
        if self.has_norm:
            query, key = self.q_norm(query, parallel), self.k_norm(key, parallel)
        query, key = rotate(query, *rope), rotate(key, *rope)
        # Keys are kept after their rotation: the position of an earlier token never changes.
        if cache is not None:
            cache, key, value = cache.extended(layer, key, value)
        query, key, value = (
            checkpoint_name(part, CheckpointName.QUERY_KEY_VALUE) for part in (query, key, value)
        )
        key, value = (
            checkpoint_name(parallel.gather_sequence(part), CheckpointName.GATHERED_KEY_VALUE)
            for part in (key, value)
        )
        # On a mesh with a context axis, queries are this device's, keys and values those of the whole window.
        output = attention_fn(which, query, key, value)
        return self.o_proj(output, execution), cache

    def _heads(self, x: Float[Array, "batch time size"]) -> Float[Array, "batch time heads head_dim"]:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)
