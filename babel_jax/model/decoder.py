"""The decoder: one module for all families, and the functions around it. A family is data: biases, norms,
tying, rope scaling, windows.

The module is never filled eagerly. `forward` and its kin take the parameters as a plain nested dict, so a
caller's step is a plain `jax.jit` over that dict. Layers are stacked and scanned: neither the trace nor, by
default, the compile time grows with depth.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from babel_jax.config import ModelConfig
from babel_jax.model.attention import (
    Attention,
    AttentionFn,
    attention_by_masks,
    masks,
    positions_of,
    tree_masks,
)
from babel_jax.model.attention_kernels import attention_fn_for
from babel_jax.model.cache import Cache
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.cross_entropy import looked_up
from babel_jax.model.execution import PLAIN, Execution
from babel_jax.model.layers import GatedMLP, RMSNorm, product, rope_tables, softcapped
from babel_jax.model.parallel import SINGLE_DEVICE, Parallelism
from babel_jax.model.parameters import bind, declare, descriptions, initialized, stack
from babel_jax.model.quantized import layer_scales, quantize_layer
from babel_jax.model.rematerialization import rematerialized

Rope = tuple[Float[Array, "#batch time half"], ...]


class Embedding(nnx.Module):
    """A table of vectors [vocab, embed], as input embedding and as output projection."""

    def __init__(self, config: ModelConfig):
        initializer = jax.nn.initializers.normal(config.initializer_range)
        self.weight = declare((config.vocab_size, config.hidden_size), ("vocab", "embed"), initializer)
        self.vocab_size = config.vocab_size

    def __call__(
        self, tokens: Int[Array, "batch time"], dtype: DTypeLike, parallel: Parallelism = SINGLE_DEVICE
    ) -> Float[Array, "batch time embed"]:
        """Rows of the table; NaN for ids beyond it, so that a wrong vocabulary shows in the loss."""
        if parallel.is_single_device:
            return jnp.take(self.weight[...], tokens, axis=0).astype(dtype)
        return looked_up(self.weight[...], tokens, self.vocab_size, dtype, parallel)

    def project(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Products with every row, float32."""
        return product(hidden, self.weight[...].astype(hidden.dtype), jnp.float32)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With `post_norms` the outputs of attention and MLP are
    normalized too (Gemma 2).

    The names are Hugging Face's: without post norms, `post_attention_layernorm` is the norm before the MLP.
    """

    def __init__(self, config: ModelConfig):
        self.input_layernorm = RMSNorm(config.hidden_size, "embed", config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, "embed", config)
        self.mlp = GatedMLP(config)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, "embed", config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, "embed", config)

    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        rope: Rope,
        attention_fn: AttentionFn,
        which: Int[Array, ""],
        layer: Int[Array, ""],
        cache: Cache | None,
        execution: Execution = PLAIN,
    ) -> tuple[Float[Array, "batch time embed"], Cache | None]:
        """The new residual stream; the cache, if any, with this layer's keys and values in it."""
        with jax.named_scope("attention"):
            normed = self.input_layernorm(x)
            attended, cache = self.self_attn(normed, rope, attention_fn, which, layer, cache, execution)
            if self.post_norms:
                attended = self.post_attention_layernorm(attended)
            x = checkpoint_name(x + attended, CheckpointName.RESIDUAL)
        with jax.named_scope("mlp"):
            if self.post_norms:
                output = self.mlp(self.pre_feedforward_layernorm(x), execution)
                return x + self.post_feedforward_layernorm(output), cache
            return x + self.mlp(self.post_attention_layernorm(x), execution), cache


class DecoderStack(nnx.Module):
    """Embedding, all layers, final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig):
        self.embed_tokens = Embedding(config)
        self.layers = stack(DecoderLayer(config), config.num_hidden_layers)
        self.norm = RMSNorm(config.hidden_size, "embed", config)
        self.windows = config.windows
        self.embedding_scale = config.hidden_size**0.5 if config.scaled_embeddings else None

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        rope: Rope,
        attention_fn: AttentionFn,
        execution: Execution,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch time embed"], Cache | None]:
        """Hidden states after the final norm, and the cache with these tokens in it."""
        # The module of one layer without its arrays, and the stacked arrays, which the scan cuts into layers.
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(
            carry: tuple[Array, Cache | None], this: tuple[nnx.State[Any, Any], Any, Array, Array]
        ) -> tuple[tuple[Array, Cache | None], None]:
            state, scales, which, layer = this
            x, cache = carry
            # Narrow values are gathered after their quantization, others in the compute type.
            if scales is None:
                weights = execution.parallel.gather_layer(state, execution.compute_dtype)
            else:
                weights = quantize_layer(state, scales, execution)
            decoder_layer = nnx.merge(graphdef, weights)
            return decoder_layer(x, rope, attention_fn, which, layer, cache, execution), None

        scales = None if execution.matmul_dtype is None else layer_scales(stacked, execution)
        # One traced layer for the whole depth: the scan carries the residual stream and the cache.
        x = self.embedded(tokens, execution)
        layers = np.arange(len(self.windows), dtype=np.int32)
        run = rematerialized(run_layer, execution)
        # Without scan_layers the same loop is written out, layer by layer.
        unroll = 1 if execution.scan_layers else len(layers)
        of_layers = (stacked, scales, self._which_window(), layers)
        (x, cache), _ = jax.lax.scan(run, (x, cache), of_layers, unroll=unroll)
        # All layers wrote at the same place; only now is that place filled.
        if cache is not None:
            cache = cache._replace(filled=cache.filled + tokens.shape[1])
        return self.norm(x), cache

    def run(
        self,
        first: Int[Array, ""],
        stop: Int[Array, ""],
        x: Float[Array, "batch time embed"],
        rope: Rope,
        attention_fn: AttentionFn,
        execution: Execution,
    ) -> Float[Array, "batch time embed"]:
        """The residual stream `x` after the layers from `first` to before `stop`. The numbers are data, so
        one program serves every part of the model.
        """
        graphdef, stacked = nnx.split(self.layers)
        parallel = execution.parallel
        which = jnp.asarray(self._which_window())

        def run_layer(layer: Int[Array, ""], x: Array) -> Array:
            state = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked
            )
            decoder_layer = nnx.merge(graphdef, parallel.gather_layer(state, execution.compute_dtype))
            after: Array = decoder_layer(x, rope, attention_fn, which[layer], layer, None, execution)[0]
            return after

        after: Array = jax.lax.fori_loop(first, stop, run_layer, x)
        return after

    def _which_window(self) -> Int[np.ndarray, "layers"]:
        # The layer's number among the distinct windows, as `masked` needs.
        distinct = distinct_windows(self.windows)
        return np.array([distinct.index(window) for window in self.windows], np.int32)

    def embedded(
        self, tokens: Int[Array, "batch time"], execution: Execution
    ) -> Float[Array, "batch time embed"]:
        """The residual stream before the first layer."""
        x = self.embed_tokens(tokens, execution.compute_dtype, execution.parallel)
        if self.embedding_scale is None:
            return x
        return x * jnp.asarray(self.embedding_scale, execution.compute_dtype)


class Decoder(nnx.Module):
    """The abstract model: every parameter of `config` with its shape, logical axes and initializer.

    `bind` gives it arrays.
    """

    def __init__(self, config: ModelConfig):
        self.model = DecoderStack(config)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config)
        self.tied, self.softcap = config.tie_word_embeddings, config.final_logit_softcapping

    def unembed(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Logits, float32."""
        with jax.named_scope("unembed"):
            return softcapped(
                (self.model.embed_tokens if self.tied else self.lm_head).project(hidden), self.softcap
            )


def distinct_windows(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The different sliding windows of a model's layers, None (all) among them, in the order of their first
    layer.
    """
    return tuple(dict.fromkeys(windows))


# --- descriptions -----------------------------------------------------------------------------------------


def describe(config: ModelConfig) -> dict[str, Any]:
    """Nested dict of `Parameter`: the one description that conversion, sharding, counts and initial values
    derive from.
    """
    return descriptions(Decoder(config))


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> PyTree[jax.ShapeDtypeStruct]:
    """The parameter tree as shapes, without memory."""
    return jax.tree.map(lambda parameter: jax.ShapeDtypeStruct(parameter.shape, dtype), describe(config))


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, without memory; tied embeddings count once."""
    return sum(math.prod(parameter.shape) for parameter in jax.tree.leaves(describe(config)))


def init_params(config: ModelConfig, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> PyTree[Array]:
    """Random initial parameters: normal matrices of std `initializer_range`, zero biases, norms of one.

    May be jitted and sharded.
    """
    return initialized(describe(config), key, dtype)


def initializing(shardings: PyTree[jax.sharding.Sharding]) -> Any:
    """`init_params` jitted, of a config and a key: each device makes its own part."""
    return jax.jit(init_params, static_argnums=0, out_shardings=shardings)


# --- the forward pass -------------------------------------------------------------------------------------


def hidden_states(
    config: ModelConfig,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    ends: Int[Array, "batch time"] | None = None,
    execution: Execution = PLAIN,
) -> Float[Array, "batch own_time embed"]:
    """Hidden states after the final norm, in the compute dtype; on a mesh, those of this device's part of
    each window.

    segment_ids: 0 is padding, 1, 2, ... are the documents of a packed window. A token attends to earlier
    tokens of its own segment. Without segment_ids a window is one document. positions: count from the start
    of each segment by default. With `ends` (and positions) the rows hold prefix trees, as `tree_masks` says,
    in place of segments.
    """
    parallel, time = execution.parallel, tokens.shape[1]
    if positions is None:
        assert ends is None
        positions = (
            jnp.arange(time, dtype=jnp.int32)[None] if segment_ids is None else positions_of(segment_ids)
        )
    windows = distinct_windows(config.windows)
    if ends is None:
        attention_fn = attention_fn_for(config, windows, execution.kernel, segment_ids, time, parallel)
    else:
        # Prefix trees have no kernel on any platform: their masks are arrays.
        attention_fn = attention_by_masks(config, tree_masks(ends, positions, windows, parallel))
    rope = rope_tables(config, parallel.sequence_shard(positions))
    decoder = bind(Decoder(config), params)
    return decoder.model(parallel.sequence_shard(tokens), rope, attention_fn, execution)[0]


def embedded(
    config: ModelConfig,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    execution: Execution = PLAIN,
) -> Float[Array, "batch time embed"]:
    """The residual stream before the first layer."""
    return bind(Decoder(config), params).model.embedded(tokens, execution)


def run_layers(
    config: ModelConfig,
    params: PyTree[Array],
    first: Int[Array, ""],
    stop: Int[Array, ""],
    x: Float[Array, "batch time embed"],
    segment_ids: Int[Array, "batch time"],
    execution: Execution = PLAIN,
) -> Float[Array, "batch time embed"]:
    """The residual stream `x` after the layers from `first` to before `stop`, which may be traced. On a mesh,
    windows are whole (`Parallelism.whole_windows`).
    """
    window_masks = masks(segment_ids, x.shape[1], distinct_windows(config.windows))
    rope = rope_tables(config, positions_of(segment_ids))
    attention_fn = attention_by_masks(config, window_masks)
    return bind(Decoder(config), params).model.run(first, stop, x, rope, attention_fn, execution)


def normed(
    config: ModelConfig, params: PyTree[Array], x: Float[Array, "batch time embed"]
) -> Float[Array, "batch time embed"]:
    """The hidden states that the output table is multiplied with, from the residual stream after the last
    layer.
    """
    return bind(Decoder(config), params).model.norm(x)


def output_table(config: ModelConfig, params: PyTree[Array]) -> Float[Array, "vocab embed"]:
    """The rows that hidden states are multiplied with to give logits: the input embedding, where they are
    tied.
    """
    result: Float[Array, "vocab embed"] = (
        params["model"]["embed_tokens"]["weight"]
        if config.tie_word_embeddings
        else params["lm_head"]["weight"]
    )
    return result


def unembed(
    config: ModelConfig,
    params: PyTree[Array],
    hidden: Float[Array, "... embed"],
    compute_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "... vocab"]:
    """float32 logits of hidden states, with the products in `compute_dtype`."""
    return bind(Decoder(config), params).unembed(hidden.astype(compute_dtype))


def forward(
    config: ModelConfig,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    execution: Execution = PLAIN,
) -> Float[Array, "batch time vocab"]:
    """float32 logits of whole rows, on one device or under plain `jax.jit`; arguments as
    of `hidden_states`.
    """
    hidden = hidden_states(
        config, params, tokens, segment_ids=segment_ids, positions=positions, execution=execution
    )
    return unembed(config, params, hidden, execution.compute_dtype)
