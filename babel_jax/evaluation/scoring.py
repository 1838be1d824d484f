"""Log-likelihoods of many token sequences: rows of prefix trees, in batches of few shapes, spread over the devices of a mesh."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm import tqdm

from babel_jax.config import ModelConfig
from babel_jax.evaluation.prefix_trees import LONGEST_PACKED, SHORTEST, Row, Scored, empty_row, planned_rows
from babel_jax.model.decoder import hidden_states, unembed
from babel_jax.model.generation import bucket
from babel_jax.training.mesh import batch_sharding, replicated

CHUNK = 32  # places of a row whose logits are held at a time
BLOCK_TOKENS = 1 << 22  # tokens planned at a time

# Of each sequence: the sum of log p over its targets, and whether every one of them is the likeliest token.
Score = tuple[float, bool]


def score(
    config: ModelConfig,
    params: PyTree[Array],
    sequences: Sequence[Scored],
    mesh: Mesh,
    batch_tokens: int,
    compute_dtype: DTypeLike = jnp.float32,
    done: Callable[[dict[int, Score]], None] = lambda scores: None,
    what: str = "scoring",
) -> list[Score]:
    """Scores of all sequences; `done` is told of those of each batch, and a progress bar says `what` is being done.

    A batch has `batch_tokens` tokens or one row for each device. At most six shapes are compiled: rows of 256 to 4,096 tokens, and one
    length for all that are longer.
    """
    scores: dict[int, Score] = {}
    longest = bucket(max((len(sequence.tokens) for sequence in sequences), default=1), SHORTEST)
    lengths = sorted({*(SHORTEST << power for power in range(5)), max(longest, LONGEST_PACKED)})

    def cost(rows: int, length: int) -> float:
        size = rows_of_batch(length, batch_tokens, mesh)
        return -(-rows // size) * size * length * _cost_of_token(config, length)

    with tqdm(total=len(sequences), desc=what, unit=" sequences", leave=False, disable=None) as progress:
        for block in _blocks(sequences):
            for length, rows in planned_rows([sequences[number] for number in block], lengths, cost).items():
                for batch in _batches(rows, length, rows_of_batch(length, batch_tokens, mesh)):
                    log_p, greedy = _score_rows(mesh, config, jnp.dtype(compute_dtype), params, batch)
                    found = {block[number]: one for number, one in _by_owner(batch, log_p, greedy)}
                    scores |= found
                    done(found)
                    progress.update(len(found))
    return [scores[number] for number in range(len(sequences))]


def _by_owner(rows: Sequence[Row], log_p: np.ndarray, greedy: np.ndarray) -> Iterator[tuple[int, Score]]:
    """The score of each sequence of a batch, by its number."""
    for row, row_log_p, row_greedy in zip(rows, log_p, greedy, strict=True):
        for number, own in row.owners:
            yield number, (float(row_log_p[own].astype(np.float64).sum()), bool(row_greedy[own].all()))


def rows_of_batch(length: int, batch_tokens: int, mesh: Mesh) -> int:
    """Rows of a batch: as many as `batch_tokens` allow, and the same number on every device that holds rows of its own."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    return groups * max(1, batch_tokens // length // groups)


def on_mesh(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """Rows that every process has, spread over the mesh."""
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])


def compilations() -> int:
    """How many programs the scoring of sequences has compiled in this process."""
    return _log_likelihoods._cache_size()  # type: ignore[attr-defined]


def _cost_of_token(config: ModelConfig, length: int) -> float:
    """Multiplications that a token costs in one layer, in a row of `length` tokens."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    matrices = config.hidden_size * (2 * config.head_dim * (heads + kv_heads) + 3 * config.intermediate_size)
    return matrices + 2 * length * heads * config.head_dim


def _blocks(sequences: Sequence[Scored]) -> Iterator[list[int]]:
    """Numbers of neighbouring sequences, so many that planning them takes little memory."""
    block: list[int] = []
    tokens = 0
    for number, sequence in enumerate(sequences):
        block.append(number)
        tokens += len(sequence.tokens)
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _batches(rows: Sequence[Row], length: int, size: int) -> Iterator[list[Row]]:
    """Batches of `size` rows; the last one is filled with empty rows."""
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        yield batch + [empty_row(length)] * (size - len(batch))


def _score_rows(
    mesh: Mesh, config: ModelConfig, compute_dtype: np.dtype, params: PyTree[Array], rows: Sequence[Row]
) -> tuple[Float[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"]]:
    names = ("tokens", "positions", "ends", "places", "targets")
    columns = [on_mesh(mesh, np.stack([getattr(row, name) for row in rows])) for name in names]
    entries = max(row.entries for row in rows)
    log_p, greedy = _log_likelihoods(mesh, config, compute_dtype, params, *columns, np.int32(-(-entries // CHUNK)))
    return np.asarray(log_p), np.asarray(greedy)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _log_likelihoods(
    mesh: Mesh,
    config: ModelConfig,
    compute_dtype: np.dtype,
    params: PyTree[Array],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    ends: Int[Array, "batch time"],
    places: Int[Array, "batch time"],
    targets: Int[Array, "batch time"],
    chunks: Int[Array, ""],
) -> tuple[Float[Array, "batch time"], Bool[Array, "batch time"]]:
    """log p of each target at its place of the row, float32, and whether it is the likeliest token; for the first `chunks` chunks.

    The results are the same on every device, so that every process has them all.
    """
    hidden = hidden_states(config, params, tokens, positions=positions, ends=ends, compute_dtype=compute_dtype)
    hidden = jax.lax.with_sharding_constraint(hidden, batch_sharding(mesh))

    def one_chunk(number: Int[Array, ""], found: tuple[Array, Array]) -> tuple[Array, Array]:
        at, wanted = (jax.lax.dynamic_slice_in_dim(column, number * CHUNK, CHUNK, axis=1) for column in (places, targets))
        logits = unembed(config, params, jnp.take_along_axis(hidden, at[..., None], axis=1), compute_dtype)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        new = chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted
        log_p, greedy = (jax.lax.dynamic_update_slice_in_dim(all, part, number * CHUNK, 1) for all, part in zip(found, new, strict=True))
        return log_p, greedy

    empty = jnp.zeros(places.shape, jnp.float32), jnp.zeros(places.shape, bool)
    return jax.lax.with_sharding_constraint(jax.lax.fori_loop(0, chunks, one_chunk, empty), replicated(mesh))
