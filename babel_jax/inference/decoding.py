"""The two compiled programs of generation: the prefill of the prompts, and the loop over new tokens.

On a mesh, each device generates its rows (ROW_AXES), and gathers the parameters of one layer, or of one piece
of the vocabulary, at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from babel_jax.config import ModelConfig
from babel_jax.model.attention import attention_by_masks, visible
from babel_jax.model.cache import Cache, empty_cache
from babel_jax.model.cross_entropy import all_logits
from babel_jax.model.decoder import Decoder, distinct_windows, output_table
from babel_jax.model.execution import Execution
from babel_jax.model.layers import rope_tables
from babel_jax.model.parallel import ROW_AXES, SINGLE_DEVICE, TENSOR, Parallelism
from babel_jax.model.parameters import bind
from babel_jax.model.sharding import parallelism_on, param_specs

NO_TOKEN = -1  # in place of a token, where a logit is NaN


class Sampling(NamedTuple):
    """The draw of the next token: divide by temperature, keep the `top_k` likeliest tokens, then keep the
    fewest whose probability reaches `top_p`.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    keys: PRNGKeyArray


class Repetition(NamedTuple):
    """A penalty on tokens that a row already has: positive logits are divided by it, others multiplied
    (Keskar et al. 2019).

    in_prompt: True for the tokens of the vocabulary that are in the prompt of each row.
    """

    penalty: Float[Array, ""]
    in_prompt: Bool[Array, "batch vocab"]


class Decoding(NamedTuple):
    """The state of the loop over new tokens: their number, the tokens [batch, new], the finished rows, the
    cache, the next logits.

    The first `shared` positions of the cache are the same in all rows. On a mesh, cache and logits are
    sharded by rows; the rest is replicated, so that every process can read it.
    """

    shared: Int[Array, ""]
    step: Int[Array, ""]
    tokens: Int[Array, "batch new"]
    finished: Bool[Array, "batch"]
    cache: Cache
    logits: Float[Array, "batch vocab"]


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="mesh")
def prefill(
    config: ModelConfig,
    new_size: int,
    compute_dtype: DTypeLike,
    params: PyTree[Array],
    prefix: Int[Array, "shared"],
    tokens: Int[Array, "batch time"],
    padding: Int[Array, "batch"],
    rows: Int[Array, ""],
    mesh: Mesh | None = None,
) -> Decoding:
    """The state before the first of at most `new_size` new tokens. Every row is `prefix`, which is computed
    once, and then its tokens.

    The first `padding` tokens of a row are padding, and so are the rows from `rows` on.
    """
    # Rows of padding are finished from the beginning.
    parallel, (batch, time) = _parallelism(mesh), tokens.shape
    shared = jnp.int32(prefix.shape[0])

    def of_own_rows(
        params: PyTree[Array], prefix: Array, tokens: Array, padding: Array
    ) -> tuple[Cache, Array]:
        empty = partial(empty_cache, config, dtype=compute_dtype, parts=parallel.size(TENSOR))
        advance = partial(_advance, config, Execution(compute_dtype, parallel=parallel), params)
        cache = empty(len(tokens), prefix.shape[0] + time + new_size)
        # The prefix is computed for one row, and its keys and values are copied into all rows.
        if prefix.shape[0]:
            none = jnp.zeros((1,), jnp.int32)
            _, seen = advance(prefix[None], none, empty(1, prefix.shape[0]), shared)
            keys = cache[0].at[:, :, :, : prefix.shape[0]].set(seen[0])
            values = cache[1].at[:, :, :, : prefix.shape[0]].set(seen[1])
            cache = Cache(keys, values, shared)
        logits, cache = advance(tokens, padding, cache, shared)
        return cache, logits

    in_specs = (param_specs(config), SAME, _BY_ROWS, _BY_ROWS)
    cache, logits = _on_rows(mesh, of_own_rows, in_specs, (_CACHE, _BY_ROWS))(params, prefix, tokens, padding)
    new = jnp.zeros((batch, new_size), jnp.int32)
    # No new token yet; the logits are those after each prompt's last token.
    state = Decoding(shared, jnp.zeros((), jnp.int32), new, jnp.arange(batch) >= rows, cache, logits)
    return _readable_everywhere(state, mesh)


@partial(jax.jit, static_argnums=(0, 1), static_argnames="mesh", donate_argnums=3)
def extend(
    config: ModelConfig,
    compute_dtype: DTypeLike,
    params: PyTree[Array],
    state: Decoding,
    padding: Int[Array, "batch"],
    until: Int[Array, ""],
    eos_ids: Int[Array, "eos"],
    sampling: Sampling | None,
    repetition: Repetition | None = None,
    mesh: Mesh | None = None,
) -> Decoding:
    """The state with further tokens: until every row is finished (has one of `eos_ids`) or has `until` new
    tokens.
    """
    parallel = _parallelism(mesh)
    execution = Execution(compute_dtype, parallel=parallel)

    def of_own_rows(
        params: PyTree[Array],
        state: Decoding,
        padding: Array,
        until: Array,
        eos_ids: Array,
        sampling: Sampling | None,
        repetition: Repetition | None,
    ) -> Decoding:
        def more(carry: tuple[Decoding, Array]) -> Bool[Array, ""]:
            state, left = carry
            return (state.step < until) & (left > 0)

        def one_more(carry: tuple[Decoding, Array]) -> tuple[Decoding, Array]:
            state, _ = carry
            # NaN is told by a token that no vocabulary has, because a jitted loop cannot raise.
            chosen = _choose(_penalized(state, repetition), sampling, state.step)
            chosen = jnp.where(jnp.isnan(state.logits).any(axis=-1), NO_TOKEN, chosen)
            new = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.step))
            finished = state.finished | jnp.isin(chosen, eos_ids)
            logits, cache = _advance(
                config, execution, params, chosen[:, None], padding, state.cache, state.shared
            )
            # Finished rows take the same steps, and their further tokens are cut off by the caller.
            state = Decoding(state.shared, state.step + 1, new, finished, cache, logits)
            return state, _unfinished(state, parallel)

        return jax.lax.while_loop(more, one_more, (state, _unfinished(state, parallel)))[0]

    specs = state_specs(_BY_ROWS)
    of_sampling: Any = SAME if sampling is None else Sampling(SAME, SAME, SAME, _BY_ROWS)
    of_repetition: Any = SAME if repetition is None else Repetition(SAME, _BY_ROWS)
    in_specs = (param_specs(config), specs, _BY_ROWS, SAME, SAME, of_sampling, of_repetition)
    extended = _on_rows(mesh, of_own_rows, in_specs, specs)
    return _readable_everywhere(extended(params, state, padding, until, eos_ids, sampling, repetition), mesh)


def _unfinished(state: Decoding, parallel: Parallelism) -> Int[Array, ""]:
    """The unfinished rows of all devices: all take the same steps, because they gather parameters."""
    left = jnp.sum(~state.finished).astype(jnp.int32)
    if parallel.is_single_device:
        return left
    # The sum takes a value of the logits too, so that it comes after the gathers for the logits. XLA for CPU
    # runs collectives in any order that the data allow; with another order on each device, they would wait
    # for each other for ever.
    after = jax.lax.bitcast_convert_type(state.logits[0, 0], jnp.int32)
    return parallel.all_reduce(jnp.stack([left, after]), ROW_AXES)[0]


SAME: Any = PartitionSpec()
_BY_ROWS: Any = PartitionSpec(ROW_AXES)
_BY_LAYER: Any = PartitionSpec(None, ROW_AXES, TENSOR)
_CACHE: Any = Cache(_BY_LAYER, _BY_LAYER, SAME)


def state_specs(tokens: Any) -> Any:
    """The partition specs of a state; `tokens` is the spec of its tokens and of the finished rows."""
    return Decoding(SAME, SAME, tokens, tokens, _CACHE, _BY_ROWS)


def _parallelism(mesh: Mesh | None) -> Parallelism:
    return SINGLE_DEVICE if mesh is None else parallelism_on(mesh, whole_windows=True)


def _on_rows(
    mesh: Mesh | None, of_own_rows: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """The function on all devices of a mesh, each with its rows."""
    if mesh is None or _parallelism(mesh).is_single_device:
        return of_own_rows
    return jax.shard_map(of_own_rows, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _readable_everywhere(state: Decoding, mesh: Mesh | None) -> Decoding:
    if mesh is None:
        return state
    tokens, finished = jax.lax.with_sharding_constraint(
        (state.tokens, state.finished), NamedSharding(mesh, PartitionSpec())
    )
    return state._replace(tokens=tokens, finished=finished)


def _advance(
    config: ModelConfig,
    execution: Execution,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    padding: Int[Array, "batch"],
    cache: Cache,
    shared: Int[Array, ""],
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after the last of `tokens`, and the cache with `tokens` in it. `tokens` follow the tokens in
    the cache.

    Padding comes after the first `shared` tokens of the cache.
    """
    # The same layers as in training, with a cache.
    decoder = bind(Decoder(config), params)
    parallel = execution.parallel

    # Entries of the cache: the shared ones, the padding, and the row's tokens. Positions skip the padding.
    source = jnp.arange(cache.keys.shape[3], dtype=jnp.int32)[None]
    real = (source < shared) | (source >= shared + padding[:, None])
    positions = jnp.where(source < shared, source, source - padding[:, None])
    new_positions = jax.lax.dynamic_slice_in_dim(positions, cache.filled, tokens.shape[1], axis=1)
    rope = rope_tables(config, jnp.maximum(new_positions, 0))
    window_masks = visible(
        new_positions[:, :, None] - positions[:, None, :], real[:, None, :], distinct_windows(config.windows)
    )
    attention_fn = attention_by_masks(config, window_masks)
    hidden, extended = decoder.model(tokens, rope, attention_fn, execution, cache)
    assert extended is not None
    if parallel.is_single_device:
        return decoder.unembed(hidden[:, -1]), extended
    return all_logits(
        hidden[:, -1], output_table(config, params), config.final_logit_softcapping, parallel
    ), extended


def _penalized(state: Decoding, repetition: Repetition | None) -> Float[Array, "batch vocab"]:
    """The next logits, with the penalty on tokens of the prompt and on new ones."""
    if repetition is None:
        return state.logits
    # The tokens of the prompt, and those written so far.
    new = jnp.arange(state.tokens.shape[1]) < state.step
    seen = repetition.in_prompt.at[jnp.arange(len(state.tokens))[:, None], state.tokens].max(new)
    penalized = jnp.where(
        state.logits < 0, state.logits * repetition.penalty, state.logits / repetition.penalty
    )
    return jnp.where(seen, penalized, state.logits)


def _choose(
    logits: Float[Array, "batch vocab"], sampling: Sampling | None, step: Int[Array, ""]
) -> Int[Array, "batch"]:
    """The next token of each row: the likeliest, or drawn."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # A key for each row and step: a row's text does not depend on the rows beside it.
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, step)
    kept = likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def likely(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Logits with -inf for all tokens but the `top_k` likeliest, and of these for all but the fewest whose
    probability reaches `top_p`.

    The second rule is nucleus sampling (Holtzman et al. 2020).
    """
    descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    # top_k first: the probabilities of top_p are those among the kept tokens.
    descending = jnp.where(jnp.arange(logits.shape[-1]) < top_k, descending, -jnp.inf)
    probability = jax.nn.softmax(descending, axis=-1)
    # A token is dropped if the likelier tokens alone reach top_p.
    reached = jnp.cumsum(probability, axis=-1) - probability >= top_p
    least = jnp.min(
        jnp.where(reached, jnp.inf, descending),
        axis=-1,
        keepdims=True,
        where=descending > -jnp.inf,
        initial=jnp.inf,
    )
    return jnp.where(logits >= least, logits, -jnp.inf)
