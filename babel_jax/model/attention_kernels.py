"""Kernels of attention over whole sequences: XLA (`flash_attention`, plain JAX), splash attention on TPU,
cuDNN on GPU. `kernel_for` chooses one; `attention_fn_for` builds it.

All give the output of `flash_attention`, up to rounding: packed segments, grouped heads, sliding windows. All
but cuDNN take soft-capped scores.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from babel_jax.config import AttentionKernel, ComputeType, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.model.attention import AttentionFn, attention_by_masks, masked, masks
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.parallel import GPU, Parallelism

_LANES = 128
_SMALLEST_HEAD = 64  # of splash attention under auto
_BLOCK = 1024  # the largest, of heads of 128; not tuned on hardware


def kernel_for(
    kernel: AttentionKernel, config: ModelConfig, time: int, platform: str, dtype: ComputeType
) -> AttentionKernel:
    """The kernel that `auto` chooses on a platform (cpu, gpu, tpu) for windows, or parts of windows, of
    `time` tokens; any other choice is returned.

    Raises BadInput for splash attention where it has no blocks of such a length, and for cuDNN where it would
    fail or give something else.
    """
    if kernel is AttentionKernel.SPLASH and time % _LANES:
        raise BadInput(
            "training.attention = splash takes windows, or the parts that context cuts them into, of a "
            f"multiple of {_LANES} tokens; "
            f"these have {time}; give auto or xla, another data.seq_len, or a smaller context in "
            "training.mesh"
        )
    softcap = config.attn_logit_softcapping
    for_cudnn = (
        dtype is ComputeType.BFLOAT16 and softcap is None and config.head_dim % 8 == 0 and time % 2 == 0
    )
    if kernel is AttentionKernel.CUDNN and not for_cudnn:
        raise BadInput(
            "training.attention = cudnn takes bfloat16, heads of a multiple of 8, an even number of tokens "
            "and no soft cap; "
            f"here are {dtype}, heads of {config.head_dim}, {time} tokens and a soft cap of {softcap}; give "
            "auto or xla"
        )
    if kernel is not AttentionKernel.AUTO:
        return kernel
    # The kernel fills smaller heads up to 128 lanes. Half of the lanes idle with heads of 64, and the
    # forecast of a step is still 1.7 times shorter than with plain blocks (0.57 billion parameters, v5e).
    fits_splash = config.head_dim >= _SMALLEST_HEAD and config.head_dim % 8 == 0
    if platform == "tpu" and time % _LANES == 0 and fits_splash:
        return AttentionKernel.SPLASH
    if platform in GPU and for_cudnn and config.head_dim <= _LANES:
        return AttentionKernel.CUDNN
    return AttentionKernel.XLA


def splash_block(tokens: int, head_dim: int) -> int:
    """The block of splash attention for so many tokens, a multiple of 128.

    That of larger heads is smaller, as it has to stay in VMEM.
    """
    largest = max(1, _BLOCK // max(head_dim, _LANES))
    return _LANES * math.gcd(tokens // _LANES, largest)


def attention_fn_for(
    config: ModelConfig,
    windows: tuple[int | None, ...],
    kernel: AttentionKernel,
    segment_ids: Int[Array, "batch source"] | None,
    source: int,
    parallel: Parallelism,
) -> AttentionFn:
    """Attention of this device's part of sequences of `source` tokens, whose `segment_ids` come in full, as
    keys and values do.
    """
    if kernel is AttentionKernel.SPLASH:
        return _splash(config, windows, segment_ids, source, parallel)
    window_masks = masks(segment_ids, source, windows, parallel)
    if kernel is AttentionKernel.CUDNN:
        return _cudnn(config, window_masks, parallel)
    return attention_by_masks(config, window_masks)


def _splash(
    config: ModelConfig,
    windows: tuple[int | None, ...],
    segment_ids: Int[Array, "batch source"] | None,
    source: int,
    parallel: Parallelism,
) -> AttentionFn:
    """The Pallas kernel of jax.experimental. Blocks that are masked in full are not computed. Off TPU the
    kernel is interpreted, for tests.

    The mask of a device depends on the positions of its queries. So masks are data: they are made for all
    devices of the context axis, and each device takes its own. Queries of the first half of a window see no
    key of the second half.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    size, scale = source // parallel.sequence_chunks, config.query_pre_attn_scalar**-0.5
    parts = parallel.chunks_by_half()
    ids = jnp.ones((1, source), jnp.int32) if segment_ids is None else segment_ids
    query_ids = jnp.split(parallel.sequence_shard(ids), len(parts), axis=1)

    def in_window(window: int | None, half: int, query: Array, key: Array, value: Array) -> Array:
        batch, heads, _, _ = query.shape
        seen = key.shape[2]
        kernel = _splash_kernel(config, window, heads, seen, size, parts[half], parallel)
        segments = splash.SegmentIds(
            *(jnp.broadcast_to(rows, (batch, rows.shape[1])) for rows in (query_ids[half], ids[:, :seen]))
        )
        result: Array = jax.vmap(kernel)(query, key, value, segments)
        return result

    def of_half(which: Int[Array, ""], half: int, query: Array, key: Array, value: Array) -> Array:
        # Of two halves, the first sees half of the keys and the second all; a window that is not cut sees
        # all.
        seen = source // len(parts) * (half + 1)
        given = (rows.swapaxes(1, 2) for rows in (query, key[:, :seen], value[:, :seen]))
        result: Array = jax.lax.switch(
            which, [partial(in_window, window, half) for window in windows], *given
        )
        return result

    def splash_attention(which: Int[Array, ""], query: Array, key: Array, value: Array) -> Array:
        # The kernel does not scale scores, so the queries are scaled.
        halves = jnp.split(query * scale, len(parts), axis=1)
        out = jnp.concatenate(
            [of_half(which, half, part, key, value) for half, part in enumerate(halves)], axis=2
        )
        return out.swapaxes(1, 2).reshape(*query.shape[:2], -1)

    return splash_attention


def _splash_kernel(
    config: ModelConfig,
    window: int | None,
    heads: int,
    seen: int,
    size: int,
    chunks: Sequence[int],
    parallel: Parallelism,
) -> Callable[..., Array]:
    """The kernel of this device for queries of one of `chunks`, each of `size` tokens, and `seen` keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

    block_q, block_kv = (splash_block(tokens, config.head_dim) for tokens in (size, seen))
    blocks = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=min(block_kv, 512),
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=min(block_kv, 512),
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    shape = (size * len(chunks), seen)
    # LocalMask counts the tokens before the query. The window counts the query too.
    mask = (
        splash_masks.CausalMask(shape)
        if window is None
        else splash_masks.LocalMask(shape, (window - 1, 0), 0)
    )
    # Chunks are in the order of the devices; the mask takes the positions of their queries from here.
    mask.q_sequence = np.concatenate(
        [np.arange(chunk * size, (chunk + 1) * size, dtype=np.int32) for chunk in chunks]
    )
    of_all = splash.make_splash_mha(
        splash_masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=config.attn_logit_softcapping,
        head_shards=1,
        q_seq_shards=len(chunks),
        residual_checkpoint_name=CheckpointName.ATTENTION_OUTPUT,
        interpret=parallel.platform != "tpu",
    )
    # Arrays of the kernel are [heads, blocks of queries, blocks of keys] and [places].
    own: Callable[..., Array] = jax.tree.map(
        lambda rows: parallel.context_shard(rows, axis=1 if rows.ndim == 3 else 0), of_all
    )
    return own


def _cudnn(config: ModelConfig, window_masks: Array, parallel: Parallelism) -> AttentionFn:
    """cuDNN's fused attention; off GPU XLA's of the same arguments, for tests.

    Its mask is a matrix for each row, so segments cost memory by the square of the sequence (cuDNN takes no
    sliding window beside a mask). In whole rows nothing is computed that the causal mask hides.
    `rematerialization.rematerialized` keeps what the backward pass needs.
    """
    scale, causal = config.query_pre_attn_scalar**-0.5, parallel.sequence_chunks == 1
    implementation: Literal["cudnn", "xla"] = "cudnn" if parallel.platform in GPU else "xla"

    def attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask[:, None],
            scale=scale,
            is_causal=causal,
            implementation=implementation,
        )
        return out.reshape(*query.shape[:2], -1)

    return masked(window_masks, attention)
