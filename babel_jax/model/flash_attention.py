"""Attention in plain JAX, a few windows at a time, with the backward pass of FlashAttention-2 (Dao 2023,
algorithm 2).

Only the size of the scores grows with the square of the sequence. At a time they exist for a few windows and
a quarter of the queries, so they stay in the cache of a CPU's cores. They are not kept for the backward pass,
which computes them again from log Z.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.layers import softcapped

# Windows are computed together as long as their scores take no more bytes than this.
_SCORE_BYTES = 16 * 2**20
# The queries of a square of scores are cut into so many parts. A part needs no keys after its own end, so 3/8
# of the work is left out.
_PARTS = 4
_LEAST = 64  # queries in a part

Rows = Float[Array, "kv_heads group time head_dim"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash_attention(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch source kv_heads head_dim"],
    value: Float[Array, "batch source kv_heads head_dim"],
    mask: Bool[Array, "#batch time source"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch time heads*head_dim"]:
    """softmax(query key^T * scale) value; scores (soft-capped, where asked) and softmax in float32.

    Heads i * heads / kv_heads and the following ones share key and value i, which are never repeated in
    memory. Where `time` equals `source`, the mask must be causal: no query sees a later key. Each query must
    see at least one key, or its gradient is wrong.
    """
    return _forward(query, key, value, mask, scale, softcap)[0]


def _forward(
    query: Array, key: Array, value: Array, mask: Array, scale: float, softcap: float | None
) -> tuple[Array, tuple[Array, Array, Array, Array, Array, Array]]:
    out, log_z = _by_windows(partial(_window, softcap), query * scale, key, value, mask)
    # Both have the name: a policy that kept the output without log Z would run the whole pass again for log
    # Z.
    out, log_z = (checkpoint_name(value, CheckpointName.ATTENTION_OUTPUT) for value in (out, log_z))
    return out, (query, key, value, mask, out, log_z)


def _backward(
    scale: float, softcap: float | None, kept: tuple[Array, Array, Array, Array, Array, Array], d_out: Array
) -> tuple[Array, Array, Array, None]:
    query, key, value, mask, out, log_z = kept
    gradients = _by_windows(
        partial(_window_backward, softcap), query * scale, key, value, mask, out, log_z, d_out
    )
    d_query, d_key, d_value = gradients
    return d_query * scale, d_key, d_value, None


flash_attention.defvjp(_forward, _backward)


def _by_windows(
    function: Callable[..., Any], query: Array, key: Array, value: Array, mask: Array, *others: Array
) -> Any:
    """Applies a function of one window to all windows, as many at a time as `_SCORE_BYTES` allows.

    Windows that may be sharded over several devices (in every program of several devices, except under
    `shard_map`) are computed all at once: a loop over them would gather them on every device.
    """
    # The scores of one window have 4 bytes for each head, query and key.
    batch, time, heads, _ = query.shape
    rows = (query, key, value, jnp.broadcast_to(mask, (batch, *mask.shape[1:])), *others)
    together = max(1, _SCORE_BYTES // (4 * heads * time * key.shape[1]))
    local = jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
    if together >= batch or not local:
        return jax.vmap(function)(*rows)
    return jax.lax.map(lambda window: function(*window), rows, batch_size=together if together > 1 else None)


def _parts(time: int, source: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the queries, each with the slice of the keys that its queries may see."""
    parts = _PARTS if time == source and time % _PARTS == 0 and time >= _PARTS * _LEAST else 1
    for part in range(parts):
        stop = (part + 1) * time // parts
        yield slice(part * time // parts, stop), slice(stop if parts > 1 else source)


def _to_rows(x: Float[Array, "time *features"], kv_heads: int, group: int) -> Rows:
    """The heads of a group become rows of one matrix product. So queries are transposed here; the far larger
    scores never are.
    """
    return x.reshape(x.shape[0], kv_heads, group, -1).transpose(1, 2, 0, 3)


def _from_rows(rows: Rows) -> Float[Array, "time heads_head_dim"]:
    return rows.transpose(2, 0, 1, 3).reshape(rows.shape[2], -1)


def _scores(
    rows: Rows,
    key: Float[Array, "kv_heads source head_dim"],
    mask: Bool[Array, "time source"],
    softcap: float | None,
) -> Float[Array, "kv_heads group*time source"]:
    kv_heads, group, time, head_dim = rows.shape
    scores = jnp.einsum(
        "krd,ksd->krs", rows.reshape(kv_heads, -1, head_dim), key, preferred_element_type=jnp.float32
    )
    scores = softcapped(scores, softcap).reshape(kv_heads, group, time, -1)
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min).reshape(kv_heads, group * time, -1)


def _window(
    softcap: float | None,
    query: Float[Array, "time heads head_dim"],
    key: Float[Array, "source kv_heads head_dim"],
    value: Float[Array, "source kv_heads head_dim"],
    mask: Bool[Array, "time source"],
) -> tuple[Float[Array, "time heads*head_dim"], Float[Array, "kv_heads group time 1"]]:
    """The attention output of one window, and log Z of each query, float32."""
    source, kv_heads, _ = key.shape
    time, heads, head_dim = query.shape
    shape = (kv_heads, heads // kv_heads, -1, head_dim)
    rows, key, value = _to_rows(query, *shape[:2]), key.swapaxes(0, 1), value.swapaxes(0, 1)
    outs, log_zs = [], []
    for queries, keys in _parts(time, source):
        scores = _scores(rows[:, :, queries], key[:, keys], mask[queries, keys], softcap)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        z = jnp.sum(weights, axis=-1, keepdims=True)
        # The weights are rounded for the product, and z is not: it is summed before. The division comes last.
        weights = weights.astype(value.dtype)
        out = jnp.einsum("krs,ksd->krd", weights, value[:, keys], preferred_element_type=jnp.float32) / z
        outs.append(out.astype(value.dtype).reshape(shape))
        log_zs.append((largest + jnp.log(z)).reshape(*shape[:3], 1))
    return _from_rows(jnp.concatenate(outs, axis=2)), jnp.concatenate(log_zs, axis=2)


def _window_backward(
    softcap: float | None,
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    out: Array,
    log_z: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of one window's query, key and value."""
    source, kv_heads, _ = key.shape
    time, heads, _ = query.shape
    group = heads // kv_heads
    rows, key, value = _to_rows(query, kv_heads, group), key.swapaxes(0, 1), value.swapaxes(0, 1)
    out, d_out = _to_rows(out, kv_heads, group), _to_rows(d_out, kv_heads, group)
    # Of each row, the sum of weights * d_weights.
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    d_rows, d_key, d_value = [], jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for queries, keys in _parts(time, source):
        scores_of = partial(_scores, mask=mask[queries, keys], softcap=softcap)
        scores, pull = jax.vjp(scores_of, rows[:, :, queries], key[:, keys])
        flat_log_z, flat_inner, flat_d_out = (
            x[:, :, queries].reshape(kv_heads, -1, x.shape[-1]) for x in (log_z, inner, d_out)
        )
        # The softmax again, from log Z: no second pass for maximum and sum.
        weights = jnp.exp(scores - flat_log_z)
        d_weights = jnp.einsum("krd,ksd->krs", flat_d_out, value[:, keys], preferred_element_type=jnp.float32)
        # The gradient of the scores, by FlashAttention-2: weights * (d_weights - inner).
        of_rows, of_key = pull(weights * (d_weights - flat_inner))
        of_value = jnp.einsum(
            "krs,krd->ksd", weights.astype(value.dtype), flat_d_out, preferred_element_type=jnp.float32
        )
        d_rows.append(of_rows)
        d_key, d_value = d_key.at[:, keys].add(of_key), d_value.at[:, keys].add(of_value)
    d_query = _from_rows(jnp.concatenate(d_rows, axis=2)).reshape(query.shape)
    return d_query, d_key.swapaxes(0, 1).astype(key.dtype), d_value.swapaxes(0, 1).astype(value.dtype)
