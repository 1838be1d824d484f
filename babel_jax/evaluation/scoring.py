"""Log-likelihoods of many token sequences: rows of prefix trees, in batches of few shapes, sharded over a
mesh.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from babel_jax.config import ModelConfig
from babel_jax.errors import NOT_FINITE, BadInput
from babel_jax.evaluation.prefix_trees import LONGEST_PACKED, SHORTEST, Row, Scored, empty_row, planned_rows
from babel_jax.inference.generation import bucket
from babel_jax.model.cross_entropy import scored_targets
from babel_jax.model.decoder import hidden_states, output_table
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import CONTEXT, WINDOW_AXES, Parallelism
from babel_jax.model.sharding import parallelism_on, param_specs
from babel_jax.progress import Work
from babel_jax.training.mesh import batch_sharding, replicated

CHUNK = 32  # entries of a row whose logits are held at a time
BLOCK_TOKENS = 1 << 22  # tokens planned at a time

_COLUMNS = ("tokens", "positions", "ends", "places", "targets")  # of a batch of rows

# For a sequence: the sum of log p over its targets, and True if each target is the likeliest token.
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
    """The scores of all sequences. `done` receives the scores of each batch; the progress bar shows `what`.

    A batch has at most `batch_tokens` tokens, and at least one row for each group of devices. At most six
    shapes are compiled: rows of 256 to 4,096 tokens, and one length for all longer sequences.
    """
    scores: dict[int, Score] = {}
    # Few lengths, because each one is a program to compile.
    lengths = row_lengths(max((len(sequence.tokens) for sequence in sequences), default=1))

    def cost(rows: int, length: int) -> float:
        # The last batch is filled up with empty rows, which cost as much as others.
        size = rows_of_batch(length, batch_tokens, mesh)
        return -(-rows // size) * size * length * _cost_of_token(config, length)

    # Block by block: the plan of millions of sequences would not fit into memory.
    with Work[Any](what, total=len(sequences), unit="sequences") as progress:
        for block in _blocks(sequences):
            planned = planned_rows([sequences[number] for number in block], lengths, cost)
            for length, rows in planned.items():
                for batch in _batches(rows, length, rows_of_batch(length, batch_tokens, mesh)):
                    log_p, greedy = _score_rows(mesh, config, jnp.dtype(compute_dtype), params, batch)
                    batch_scores = {}
                    for number, of_sequence in _by_owner(batch, log_p, greedy):
                        batch_scores[block[number]] = of_sequence
                    scores |= batch_scores
                    done(batch_scores)
                    progress.update(len(batch_scores))
    # Rows hold sequences in another order than the caller's.
    return [scores[number] for number in range(len(sequences))]


def row_lengths(longest: int) -> list[int]:
    """The row lengths for sequences of at most `longest` tokens."""
    packed = [SHORTEST << power for power in range(5)]
    return sorted({*packed, max(bucket(longest, SHORTEST), LONGEST_PACKED)})


def scoring_program(
    mesh: Mesh,
    config: ModelConfig,
    compute_dtype: DTypeLike,
    params: PyTree[jax.ShapeDtypeStruct],
    length: int,
    batch_tokens: int,
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function that `score` calls for rows of a length, and its arguments as shapes."""
    rows = jax.ShapeDtypeStruct(
        (rows_of_batch(length, batch_tokens, mesh), length), jnp.int32, sharding=batch_sharding(mesh)
    )
    chunks = jax.ShapeDtypeStruct((), jnp.int32)
    return _log_likelihoods, (mesh, config, jnp.dtype(compute_dtype), params, *[rows] * len(_COLUMNS), chunks)


def _by_owner(rows: Sequence[Row], log_p: np.ndarray, greedy: np.ndarray) -> Iterator[tuple[int, Score]]:
    """The score of each sequence of a batch, with its number. Raises BadInput where one is not finite."""
    for row, row_log_p, row_greedy in zip(rows, log_p, greedy, strict=True):
        for number, entries in row.owners:
            if not np.isfinite(row_log_p[entries]).all():
                raise BadInput(NOT_FINITE)
            # float32 would lose digits in a sum over thousands of tokens.
            log_likelihood = float(row_log_p[entries].astype(np.float64).sum())
            yield number, (log_likelihood, bool(row_greedy[entries].all()))


def rows_of_batch(length: int, batch_tokens: int, mesh: Mesh, axes: tuple[str, ...] = WINDOW_AXES) -> int:
    """The rows of a batch: at most `batch_tokens` in all, with the same number for each device group that
    reads different rows; at least one row per group.
    """
    groups = math.prod(mesh.shape[axis] for axis in axes)
    result: int = groups * max(1, batch_tokens // length // groups)
    return result


def on_mesh(mesh: Mesh, rows: np.ndarray, axes: tuple[str, ...] = WINDOW_AXES) -> jax.Array:
    """Rows that every process has, sharded over these axes of the mesh."""
    return jax.make_array_from_callback(
        rows.shape, NamedSharding(mesh, PartitionSpec(axes)), lambda index: rows[index]
    )


def compilations() -> int:
    """The number of scoring programs compiled in this process."""
    result: int = _log_likelihoods._cache_size()  # type: ignore[attr-defined]
    return result


def _cost_of_token(config: ModelConfig, length: int) -> float:
    """The multiplications for one token in one layer, in a row of `length` tokens."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # Projections and MLP cost the same for each token; attention grows with the row.
    # Projections of queries and output (heads), of keys and values (kv_heads), and the three of the MLP.
    matrices = config.hidden_size * (2 * config.head_dim * (heads + kv_heads) + 3 * config.intermediate_size)
    return float(matrices + 2 * length * heads * config.head_dim)


def _blocks(sequences: Sequence[Scored]) -> Iterator[list[int]]:
    """Blocks of neighbouring sequences, by number; the plan of a block takes little memory."""
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
    """Batches of `size` rows; the last one is filled up with empty rows."""
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        yield batch + [empty_row(length)] * (size - len(batch))


def _score_rows(
    mesh: Mesh, config: ModelConfig, compute_dtype: np.dtype, params: PyTree[Array], rows: Sequence[Row]
) -> tuple[Float[np.ndarray, "batch time"], Bool[np.ndarray, "batch time"]]:
    columns = []
    for name in _COLUMNS:
        values = [getattr(row, name) for row in rows]
        columns.append(on_mesh(mesh, np.stack(values)))
    # Chunks of padding alone are not computed.
    entries = max(row.entries for row in rows)
    log_p, greedy = _log_likelihoods(
        mesh, config, compute_dtype, params, *columns, np.int32(-(-entries // CHUNK))
    )
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
    """For each entry of the first `chunks` chunks: log p of its target, float32, and whether it is the
    likeliest token. `prefix_trees.Row` says what entries, places and ends are.

    As in the train step, each device computes its rows, or its part of each row, and gathers the parameters
    of one layer, or of one piece of the vocabulary, at a time. Every device returns all results, so that
    every process has them.
    """
    parallel = parallelism_on(mesh)

    def of_own_rows(params: PyTree[Array], chunks: Array, *columns: Array) -> tuple[Array, Array]:
        tokens, positions, ends, places, targets = columns
        hidden = hidden_states(
            config,
            params,
            tokens,
            positions=positions,
            ends=ends,
            execution=Execution(compute_dtype, parallel=parallel),
        )
        # Entries fill the beginning of their list, so the devices of the context axis take them in turn: each
        # then has about the same number.
        places, targets = _in_turn(places, parallel), _in_turn(targets, parallel)
        log_p, greedy = _of_entries(
            config, params, parallel.gather_sequence(hidden), places, targets, chunks, parallel
        )
        return _all_turns(log_p, parallel), _all_turns(greedy, parallel)

    # A single device has no mesh axes to name.
    columns = (tokens, positions, ends, places, targets)
    if parallel.is_single_device:
        return of_own_rows(params, chunks, *columns)
    # Parameters keep their shards: a layer is gathered when it is used.
    rows = PartitionSpec(WINDOW_AXES)
    in_specs = (param_specs(config), PartitionSpec(), *[rows] * len(columns))
    scores = jax.shard_map(
        of_own_rows, mesh=mesh, in_specs=in_specs, out_specs=(rows, rows), check_vma=False
    )(params, chunks, *columns)
    result: tuple[Float[Array, "batch time"], Bool[Array, "batch time"]] = jax.lax.with_sharding_constraint(
        scores, replicated(mesh)
    )
    return result


def _of_entries(
    config: ModelConfig,
    params: PyTree[Array],
    hidden: Float[Array, "batch time embed"],
    places: Int[Array, "batch entries"],
    targets: Int[Array, "batch entries"],
    chunks: Int[Array, ""],
    parallel: Parallelism,
) -> tuple[Float[Array, "batch entries"], Bool[Array, "batch entries"]]:
    """log p of the target of each entry of the first chunks, given the hidden state at its place; and True if
    it is the likeliest token.
    """

    def in_chunks(column: Array) -> Array:
        """[batch, entries, ..] to [chunks, batch x entries of a chunk, ..]."""
        split = column.reshape(rows, count, -1, *column.shape[2:]).swapaxes(0, 1)
        return split.reshape(count, -1, *column.shape[2:])

    def in_rows(scores: Array) -> Array:
        """[chunks, batch x entries of a chunk] to [batch, entries]."""
        return scores.reshape(count, rows, -1).swapaxes(0, 1).reshape(rows, entries)

    rows, entries = places.shape

    # Logits are held for one chunk at a time: [chunk, vocabulary] is the largest array here. A chunk has
    # CHUNK entries over all devices of the context axis, and the number of chunks divides the entries.
    count = entries // math.gcd(CHUNK // parallel.size(CONTEXT) or 1, entries)
    at_places = jnp.take_along_axis(hidden, places[..., None], axis=1)
    scores = scored_targets(
        in_chunks(at_places),
        in_chunks(targets),
        chunks,
        output_table(config, params),
        config.final_logit_softcapping,
        parallel,
    )
    log_p, greedy = scores
    return in_rows(log_p), in_rows(greedy)


def _in_turn(column: Int[Array, "batch time"], parallel: Parallelism) -> Int[Array, "batch own"]:
    """The entries of this device: every n-th entry, for n devices on the context axis."""
    devices = parallel.size(CONTEXT)
    # Entries 0, n, 2n, ... come first, then 1, n + 1, ...: each device's are together.
    by_device = column.reshape(column.shape[0], -1, devices).swapaxes(1, 2).reshape(column.shape)
    return parallel.context_shard(by_device, axis=1)


def _all_turns(entries: Array, parallel: Parallelism) -> Array:
    """The entries of all devices of the context axis, in order."""
    if parallel.size(CONTEXT) == 1:
        return entries
    result: Array = jax.lax.all_gather(entries, CONTEXT, axis=2).reshape(entries.shape[0], -1)
    return result
