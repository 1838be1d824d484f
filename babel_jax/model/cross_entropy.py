"""The embedding lookup and the chunked cross-entropy: both work on one piece of the vocabulary at a time, so
that of a large vocabulary neither the whole table nor all logits are in memory. A table that is small enough
is one piece, and its logits are kept.

The tables are [vocab, embed], sharded as `Parallelism` says. A piece is gathered and used, and its gradient
is complete and scattered, before the next piece begins. Only arrays of the size of the activations live
through the loop.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from babel_jax.config.settings import divisors
from babel_jax.model.layers import product, softcapped
from babel_jax.model.parallel import GPU, TENSOR, Parallelism

_AXES = ("vocab", "embed")
# The most elements of a piece's logits, or of its rows of the table if these have more. On GPUs 1 GiB,
# because each piece reads and writes the running sums once more.
_LARGEST_PIECE = 2**26
_LARGEST_PIECE_ON_GPU = 2**28


def pieces(rows: int, tokens: int, embed: int, platform: str) -> int:
    """The number of equal pieces for a table of `rows` rows: the fewest whose logits are not too large."""
    largest = _LARGEST_PIECE_ON_GPU if platform in GPU else _LARGEST_PIECE
    return next(
        count for count in divisors(rows) if rows // count * max(tokens, embed) <= largest or count == rows
    )


def looked_up(
    weight: Float[Array, "rows part"],
    tokens: Int[Array, "batch time"],
    vocab: int,
    dtype: DTypeLike,
    parallel: Parallelism,
) -> Float[Array, "batch time embed"]:
    """Rows of the table; NaN for ids beyond it.

    If a token occurs many times, the gradients of its row are summed in float32.
    """
    rows = weight.shape[0]
    count = pieces(rows, tokens.size, weight.shape[1] * parallel.weight_shards, parallel.platform)
    first, size = parallel.first_feature(rows), rows // count

    @partial(jax.checkpoint, prevent_cse=False)
    def add(x: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        start, part = piece
        # Float32: the gradients of a frequent token are summed over thousands of places.
        table = parallel.gather_weight(part, _AXES, dtype).astype(jnp.float32)
        # Each id is in one piece of one device. All other pieces add 0 for it.
        place = tokens - (first + start)
        here = (place >= 0) & (place < size)
        return x + jnp.where(here[..., None], jnp.take(table, jnp.where(here, place, 0), axis=0), 0.0), None

    x = jnp.zeros((*tokens.shape, weight.shape[1] * parallel.weight_shards), jnp.float32)
    starts = jnp.arange(count, dtype=jnp.int32) * size
    x, _ = jax.lax.scan(add, x, (starts, weight.reshape(count, size, -1)))
    # Rows beyond the vocabulary are padding for the mesh, and no token may use them.
    known = (tokens >= 0) & (tokens < vocab)
    return jnp.where(known[..., None], parallel.row_parallel_sum(x), jnp.nan).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def target_logits(
    hidden: Float[Array, "tokens embed"],
    weight: Float[Array, "rows part"],
    targets: Int[Array, "tokens"],
    softcap: float | None,
    parallel: Parallelism,
) -> tuple[Float[Array, "tokens"], Float[Array, "tokens"]]:
    """The logit of each target and log Z, the logarithm of the softmax's normalizer; float32: all that a
    cross-entropy needs of the logits.

    Products are in the type of `hidden`. The backward pass computes the logits again, unless one piece holds
    them all.
    """
    result: tuple[Float[Array, "tokens"], Float[Array, "tokens"]] = _forward(
        hidden, weight, targets, softcap, parallel
    )[0]
    return result


def _forward(  # type: ignore[no-untyped-def]
    hidden: Array, weight: Array, targets: Array, softcap: float | None, parallel: Parallelism
):
    starts, parts = _parts(hidden, weight, parallel)
    size = parts.shape[1]

    def add(carry: tuple[Array, Array, Array], piece: tuple[Array, Array]):  # type: ignore[no-untyped-def]
        largest, total, picked = carry
        start, part = piece
        logits = softcapped(product(hidden, _table(part, hidden.dtype, parallel), jnp.float32), softcap)
        # The running log-sum-exp: the sum so far is scaled to the new maximum.
        new_largest = jnp.maximum(largest, logits.max(axis=-1))
        total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[:, None]).sum(axis=-1)
        place = targets - start
        here = (place >= 0) & (place < size)
        found = jnp.take_along_axis(logits, jnp.where(here, place, 0)[:, None], axis=-1)[:, 0]
        return (new_largest, total, jnp.where(here, found, picked)), logits if len(parts) == 1 else None

    tokens = hidden.shape[:1]
    carry = (jnp.full(tokens, jnp.finfo(jnp.float32).min), jnp.zeros(tokens), jnp.zeros(tokens))
    (largest, total, picked), logits = jax.lax.scan(add, carry, (starts, parts))
    # Each device of the tensor axis has summed its own rows; the sums need one common maximum.
    overall = parallel.max_over_features(largest)
    log_z = overall + jnp.log(parallel.all_reduce(total * jnp.exp(largest - overall), (TENSOR,)))
    return (parallel.all_reduce(picked, (TENSOR,)), log_z), (hidden, weight, targets, log_z, logits)


def _backward(softcap: float | None, parallel: Parallelism, saved, gradients):  # type: ignore[no-untyped-def]
    hidden, weight, targets, log_z, kept = saved
    of_picked, of_log_z = gradients
    starts, parts = _parts(hidden, weight, parallel)

    def add(of_hidden: Array, piece: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        start, part, logits = piece
        # `to_part` is the backward pass of the gather: it scatters the gradient of the piece to its devices.
        table, to_part = jax.vjp(lambda part: _table(part, hidden.dtype, parallel), part)
        if logits is None:
            logits = softcapped(product(hidden, table, jnp.float32), softcap)
        # The gradient of log Z is the softmax; that of the picked logit is 1 at the target.
        chosen = jnp.arange(logits.shape[1], dtype=jnp.int32) == (targets - start)[:, None]
        of_logits = jnp.exp(logits - log_z[:, None]) * of_log_z[:, None] + jnp.where(
            chosen, of_picked[:, None], 0.0
        )
        # The derivative of cap * tanh(x / cap), from its value.
        if softcap is not None:
            of_logits = of_logits * (1.0 - jnp.square(logits / softcap))
        # The two products of the backward pass, in the type of the forward one.
        of_logits = of_logits.astype(hidden.dtype)
        of_table = jnp.einsum("nv,ne->ve", of_logits, hidden)
        of_hidden = of_hidden + jnp.einsum("nv,ve->ne", of_logits, table, preferred_element_type=jnp.float32)
        return of_hidden, to_part(of_table)[0]

    of_hidden, of_parts = jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), (starts, parts, kept))
    of_hidden = parallel.all_reduce(of_hidden, (TENSOR,)).astype(hidden.dtype)
    return of_hidden, of_parts.reshape(weight.shape), None


target_logits.defvjp(_forward, _backward)


def scored_targets(
    hidden: Float[Array, "chunks tokens embed"],
    targets: Int[Array, "chunks tokens"],
    chunks: Int[Array, ""],
    weight: Float[Array, "rows part"],
    softcap: float | None,
    parallel: Parallelism,
) -> tuple[Float[Array, "chunks tokens"], Bool[Array, "chunks tokens"]]:
    """log p of each target, float32, and whether it is the likeliest token (the one of the lowest id, where
    several are).

    Only the first `chunks` are computed. No piece of the table is gathered twice, and the logits of one chunk
    and one piece exist at a time. Not to be differentiated.
    """
    starts, parts = _parts(hidden[0], weight, parallel)
    size = parts.shape[1]

    def add_piece(carry: tuple[Array, ...], piece: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        start, part = piece
        table = _table(part, hidden.dtype, parallel)

        def add_chunk(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, picked, likeliest = (column[number] for column in carry)
            logits = softcapped(product(hidden[number], table, jnp.float32), softcap)
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            best_logit = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
            new_largest = jnp.maximum(largest, best_logit)
            total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[:, None]).sum(
                axis=-1
            )
            place = targets[number] - start
            here = (place >= 0) & (place < size)
            found = jnp.take_along_axis(logits, jnp.where(here, place, 0)[:, None], axis=-1)[:, 0]
            # A logit must be larger than the largest so far: of equal ones, the lower id stays.
            new = (
                new_largest,
                total,
                jnp.where(here, found, picked),
                jnp.where(best_logit > largest, start + best, likeliest),
            )
            return tuple(column.at[number].set(values) for column, values in zip(carry, new, strict=True))

        return jax.lax.fori_loop(0, chunks, add_chunk, carry), None

    lowest = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
    empty: tuple[Array, ...] = (
        lowest,
        jnp.zeros(targets.shape),
        jnp.zeros(targets.shape),
        jnp.zeros(targets.shape, jnp.int32),
    )
    (largest, total, picked, likeliest), _ = jax.lax.scan(add_piece, empty, (starts, parts))
    overall = parallel.max_over_features(largest)
    total = parallel.all_reduce(total * jnp.exp(largest - overall), (TENSOR,))
    # Each device of the tensor axis has the likeliest of its own rows. The lowest id wins where several are
    # equal.
    beyond = jnp.iinfo(jnp.int32).max
    likeliest = -parallel.max_over_features(-jnp.where(largest == overall, likeliest, beyond))
    return parallel.all_reduce(picked, (TENSOR,)) - overall - jnp.log(total), likeliest == targets


def all_logits(
    hidden: Float[Array, "rows embed"],
    weight: Float[Array, "rows part"],
    softcap: float | None,
    parallel: Parallelism,
) -> Float[Array, "rows vocab"]:
    """The logits of the whole vocabulary, float32, by products in the type of `hidden`.

    Not to be differentiated.
    """
    _, parts = _parts(hidden, weight, parallel)

    def of_piece(carry: None, part: Array) -> tuple[None, Array]:
        return carry, softcapped(product(hidden, _table(part, hidden.dtype, parallel), jnp.float32), softcap)

    _, logits = jax.lax.scan(of_piece, None, parts)
    # Pieces are along the vocabulary, and the scan has put them first.
    own = logits.swapaxes(0, 1).reshape(len(hidden), -1)
    return parallel.gather_features(own)


def _parts(
    hidden: Array, weight: Array, parallel: Parallelism
) -> tuple[Int[Array, "count"], Float[Array, "count size part"]]:
    """The first token id of each piece of the table, and the pieces."""
    rows = weight.shape[0]
    count = pieces(rows, hidden.shape[0], hidden.shape[1], parallel.platform)
    # Ids count over all devices of the tensor axis.
    starts = parallel.first_feature(rows) + jnp.arange(count, dtype=jnp.int32) * (rows // count)
    return starts, weight.reshape(count, rows // count, -1)


def _table(part: Array, dtype: DTypeLike, parallel: Parallelism) -> Float[Array, "size embed"]:
    return parallel.gather_weight(part, _AXES, dtype).astype(dtype)
