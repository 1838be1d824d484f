"""Text generation: checks the prompts, pads them on the left, and runs the compiled programs of `decoding`.

Lengths are rounded up to powers of two, so that few programs are compiled.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from babel_jax.config import ModelConfig
from babel_jax.errors import NOT_FINITE, BadInput
from babel_jax.inference.decoding import NO_TOKEN, SAME, Repetition, Sampling, extend, prefill, state_specs
from babel_jax.model.parallel import ROW_AXES
from babel_jax.progress import working

SMALLEST_BUCKET = 16
MOST_PENALTY = 1e6  # of repetition; the least is 1 / MOST_PENALTY. Logits in float32 are divided by it


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
    _check_choice(temperature, top_k, top_p, repetition_penalty)

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
    # One row for each prompt: True for each token of the vocabulary that the prompt has.
    repetition = None
    if repetition_penalty != 1.0:
        in_prompt = np.zeros((rows, config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            in_prompt[row, list(prompt)] = True
        repetition = Repetition(jnp.float32(repetition_penalty), cast(Array, in_prompt))
    with working("generating text"):
        choice = (max_new_tokens, eos, sampling, repetition)
        state = extend(config, compute_dtype, params, state, padding, *choice, mesh=mesh)
        jax.block_until_ready(state.tokens)
    new = np.asarray(state.tokens)[: len(prompts), : int(state.step)]
    return [until_first(row, eos_ids) for row in new.tolist()]


def _check_choice(temperature: float, top_k: int | None, top_p: float, repetition_penalty: float) -> None:
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
    # The state that prefill returns, as shapes: extend takes this state.
    state = jax.eval_shape(partial(prefill, *prefill_args[:3], mesh=mesh), *prefill_args[3:])
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(SAME))
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
        if token == NO_TOKEN:
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
