"""Text generation: a prefill of the prompts, then one token at a time with a key-value cache; each is one
compiled program.

Prompts are padded on the left, and lengths are rounded up to powers of two, so that few programs are
compiled. On a mesh, each device generates its rows (ROW_AXES), and gathers the parameters of one layer, or of
one piece of the vocabulary, at a time.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from babel_jax.config import ModelConfig
from babel_jax.errors import NOT_FINITE, BadInput
from babel_jax.model.attention import attention_by_masks, visible
from babel_jax.model.cache import Cache, empty_cache
from babel_jax.model.cross_entropy import all_logits
from babel_jax.model.decoder import Decoder, distinct_windows, output_table
from babel_jax.model.execution import Execution
from babel_jax.model.layers import rope_tables
from babel_jax.model.parallel import ROW_AXES, SINGLE_DEVICE, TENSOR, Parallelism
from babel_jax.model.parameters import bind
from babel_jax.model.sharding import parallelism_on, param_specs

SMALLEST_BUCKET = 16
_NO_TOKEN = -1  # in place of a token, where a logit is NaN
MOST_PENALTY = 1e6  # of repetition; the least is 1 / MOST_PENALTY. Logits in float32 are divided by it


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


def generate(
    config: ModelConfig,
    params: PyTree[Array],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    compute_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """The new tokens for each prompt; all prompts are one batch. The first of `eos_ids` ends a row and is its
    last token.

    With `mesh`, `params` must be sharded by `param_specs`; rows are spread over the mesh.

    Temperature 0 takes the likeliest token. The draws of a prompt depend only on `seed` and its index in
    `prompts`. Raises BadInput for an empty prompt, ids outside the vocabulary, lengths beyond the model's
    positions, and logits that are NaN.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    _check(config, prompts, max_new_tokens)
    if not 0.0 <= temperature < float("inf") or not 0.0 < top_p <= 1.0 or (top_k is not None and top_k < 1):
        raise BadInput(
            f"temperature = {temperature}, top_p = {top_p}, top_k = {top_k}: need temperature >= 0, 0 < "
            "top_p <= 1, top_k >= 1"
        )
    if not 1.0 / MOST_PENALTY <= repetition_penalty <= MOST_PENALTY:
        raise BadInput(
            f"repetition_penalty = {repetition_penalty}: a number above 0, and at most {MOST_PENALTY:g}, is "
            "needed"
        )

    rows, time = rows_of(mesh, len(prompts)), bucket(max(len(prompt) for prompt in prompts), SMALLEST_BUCKET)
    tokens, padding = padded_left(prompts, rows, time)
    # Each row has its key, so that its draws do not depend on the other prompts.
    sampling = None
    if temperature > 0.0:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))
        top_k = min(top_k or config.vocab_size, config.vocab_size)
        sampling = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), keys)

    new_size, eos = bucket(max_new_tokens, SMALLEST_BUCKET), np.array(eos_ids or [-1], np.int32)
    nothing_shared = np.zeros(0, np.int32)
    state = prefill(
        config, new_size, compute_dtype, params, nothing_shared, tokens, padding, len(prompts), mesh=mesh
    )
    repetition = None
    if repetition_penalty != 1.0:
        in_prompt = np.zeros((rows, config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            in_prompt[row, list(prompt)] = True
        repetition = Repetition(jnp.float32(repetition_penalty), cast(Array, in_prompt))
    state = extend(
        config, compute_dtype, params, state, padding, max_new_tokens, eos, sampling, repetition, mesh=mesh
    )
    new = np.asarray(state.tokens)[: len(prompts), : int(state.step)]
    return [until_first(row, eos_ids) for row in new.tolist()]


def generation_programs(
    mesh: Mesh,
    config: ModelConfig,
    compute_dtype: DTypeLike,
    params: PyTree[jax.ShapeDtypeStruct],
    prompts: int,
    tokens: int,
    new_tokens: int,
    sampled: bool = False,
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The jitted functions that `generate` calls for so many prompts of so many tokens, with their arguments
    as shapes: prefill, extend.
    """
    rows, new_size = rows_of(mesh, prompts), bucket(new_tokens, SMALLEST_BUCKET)
    # The shapes that `generate` has after padding to buckets.
    number, none = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((0,), jnp.int32)
    prompt_ids = jax.ShapeDtypeStruct((rows, bucket(tokens, SMALLEST_BUCKET)), jnp.int32)
    padding, eos = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    prefill_args = (config, new_size, compute_dtype, params, none, prompt_ids, padding, number)
    state = jax.eval_shape(partial(prefill, *prefill_args[:3], mesh=mesh), *prefill_args[3:])
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _of_state(_SAME))
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    sampling = None
    if sampled:
        keys = jax.eval_shape(partial(jax.random.split, num=rows), jax.random.key(0))
        sampling = Sampling(jnp.float32(1.0), jnp.int32(1), jnp.float32(1.0), keys)
    extend_args = (config, compute_dtype, params, state, padding, number, eos, sampling, None)
    return [(prefill, prefill_args, {"mesh": mesh}), (extend, extend_args, {"mesh": mesh})]


def until_first(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first of `eos_ids`; all tokens if there is none.

    Raises BadInput if a logit of one of them was NaN.
    """
    for index, token in enumerate(tokens):
        if token == _NO_TOKEN:
            raise BadInput(NOT_FINITE)
        if token in eos_ids:
            return tokens[: index + 1]
    return tokens


def rows_of(mesh: Mesh | None, prompts: int) -> int:
    """The rows of a batch of so many prompts: the same power of two on each device that has its own rows."""
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROW_AXES)
    return devices * bucket(-(-prompts // devices), 1)


def padded_left(
    prompts: Sequence[Sequence[int]], rows: int, time: int
) -> tuple[Int[np.ndarray, "rows time"], Int[np.ndarray, "rows"]]:
    """Prompts at the right end of `rows` rows of `time` tokens, and the number of padding positions before
    each.
    """
    tokens, padding = np.zeros((rows, time), np.int32), np.full(rows, time, np.int32)
    for row, prompt in enumerate(prompts):
        padding[row] = time - len(prompt)
        tokens[row, padding[row] :] = prompt
    return tokens, padding


def bucket(size: int, smallest: int) -> int:
    """The smallest power of two that is at least `size` and `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise BadInput(f"prompt {number} is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise BadInput(
                f"prompt {number} has a token id outside of the model's vocabulary, 0 to "
                f"{config.vocab_size - 1}"
            )
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise BadInput(
                f"prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the "
                f"model's {config.max_position_embeddings} positions: shorten it or ask for fewer"
            )


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
            keys, values = (
                all.at[:, :, :, : prefix.shape[0]].set(part)
                for all, part in zip(cache[:2], seen[:2], strict=True)
            )
            cache = Cache(keys, values, shared)
        logits, cache = advance(tokens, padding, cache, shared)
        return cache, logits

    in_specs = (param_specs(config), _SAME, _BY_ROWS, _BY_ROWS)
    cache, logits = _on_rows(mesh, of_own_rows, in_specs, (_CACHE, _BY_ROWS))(params, prefix, tokens, padding)
    new = jnp.zeros((batch, new_size), jnp.int32)
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
        def unfinished(state: Decoding) -> Int[Array, ""]:
            """The unfinished rows of all devices: all take the same steps, because they gather parameters."""
            left = jnp.sum(~state.finished).astype(jnp.int32)
            if parallel.is_single_device:
                return left
            # The sum takes a value of the logits too, so that it comes after the gathers for the logits. XLA
            # for CPU runs collectives in any order that the data allow; with another order on each device,
            # they would wait for each other for ever.
            after = jax.lax.bitcast_convert_type(state.logits[0, 0], jnp.int32)
            return parallel.all_reduce(jnp.stack([left, after]), ROW_AXES)[0]

        def more(carry: tuple[Decoding, Array]) -> Bool[Array, ""]:
            state, left = carry
            return (state.step < until) & (left > 0)

        def one_more(carry: tuple[Decoding, Array]) -> tuple[Decoding, Array]:
            state, _ = carry
            chosen = _choose(_penalized(state, repetition), sampling, state.step)
            chosen = jnp.where(jnp.isnan(state.logits).any(axis=-1), _NO_TOKEN, chosen)
            new = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.step))
            finished = state.finished | jnp.isin(chosen, eos_ids)
            logits, cache = _advance(
                config, execution, params, chosen[:, None], padding, state.cache, state.shared
            )
            state = Decoding(state.shared, state.step + 1, new, finished, cache, logits)
            return state, unfinished(state)

        return jax.lax.while_loop(more, one_more, (state, unfinished(state)))[0]

    of_state = _of_state(_BY_ROWS)
    of_sampling: Any = _SAME if sampling is None else Sampling(_SAME, _SAME, _SAME, _BY_ROWS)
    of_repetition: Any = _SAME if repetition is None else Repetition(_SAME, _BY_ROWS)
    in_specs = (param_specs(config), of_state, _BY_ROWS, _SAME, _SAME, of_sampling, of_repetition)
    extended = _on_rows(mesh, of_own_rows, in_specs, of_state)
    return _readable_everywhere(extended(params, state, padding, until, eos_ids, sampling, repetition), mesh)


_SAME: Any = PartitionSpec()
_BY_ROWS: Any = PartitionSpec(ROW_AXES)
_BY_LAYER: Any = PartitionSpec(None, ROW_AXES, TENSOR)
_CACHE: Any = Cache(_BY_LAYER, _BY_LAYER, _SAME)


def _of_state(tokens: Any) -> Any:
    """The partition specs of a state; `tokens` is the spec of its tokens and of the finished rows."""
    return Decoding(_SAME, _SAME, tokens, tokens, _CACHE, _BY_ROWS)


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
