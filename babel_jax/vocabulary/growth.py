"""Rows of the embedding and the head for new tokens. Each new row is a weighted sum of old rows: so growth is
the same on a folder that is streamed and on parameters in memory, on any mesh.
"""

import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, PyTree

from babel_jax.config import ModelConfig, RowInit
from babel_jax.model.shapes import TABLES
from babel_jax.model_folders.names import tensor_place
from babel_jax.model_folders.streaming import Piece, TensorSource, pieces
from babel_jax.model_folders.transfer import Change
from babel_jax.vocabulary.extension import NewRow


@dataclasses.dataclass(frozen=True)
class Growth:
    """New rows as sums of old ones.

    ids: int32[new], ascending. sources: int32[new, terms], ids of old rows. weights: float32[new, terms], 0
    for terms that a row does not need; what the weights of a row lack to a sum of 1 is the weight of the mean
    of all old rows. old_rows, rows: the rows of the tables before and after. Rows that no token has are the
    mean of all old rows.
    """

    ids: np.ndarray
    sources: np.ndarray
    weights: np.ndarray
    old_rows: int
    rows: int

    @property
    def digest(self) -> str:
        """A digest of everything that the new rows depend on."""
        parts = [self.ids.tobytes(), self.sources.tobytes(), self.weights.tobytes()]
        return hashlib.sha256(b"".join(parts) + f"{self.old_rows} {self.rows}".encode()).hexdigest()

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """The arguments of `growing` after the parameters."""
        return self.ids, self.sources, self.weights, self.rows


def mean_growth(rows: Sequence[NewRow], init: RowInit, old_rows: int, all_rows: int) -> Growth:
    """The growth by means: of each row's parts, or of all old rows (rows without terms)."""
    ordered = sorted(rows, key=lambda row: row.id)
    terms = max([len(row.parts) for row in ordered], default=1) if init is RowInit.PARTS else 1
    sources = np.zeros((len(ordered), terms), np.int32)
    weights = np.zeros((len(ordered), terms), np.float32)
    if init is RowInit.PARTS:
        for number, row in enumerate(ordered):
            sources[number, : len(row.parts)] = row.parts
            weights[number, : len(row.parts)] = 1 / len(row.parts)
    return Growth(np.array([row.id for row in ordered], np.int32), sources, weights, old_rows, all_rows)


def padded_rows(old_rows: int, size: int, multiple: int) -> int:
    """The rows of the tables for a tokenizer with ids up to `size` - 1: at least the old ones, and a multiple
    of `multiple` if there are more.
    """
    return old_rows if size <= old_rows else -(-size // multiple) * multiple


def grow_config(config: ModelConfig, growth: Growth) -> ModelConfig:
    """The config with the larger vocabulary."""
    return config.model_copy(update={"vocab_size": growth.rows})


def growing(shardings: PyTree[jax.sharding.Sharding]) -> Any:
    """The program that makes larger tables: jitted, of parameters and `Growth.arguments`, to parameters that
    are sharded by `shardings`.
    """

    def grow(params: PyTree[Array], ids: Array, sources: Array, weights: Array, rows: int) -> PyTree[Array]:
        leaves = traverse_util.flatten_dict(params)
        for place in TABLES:
            if place in leaves:
                leaves[place] = _grown(leaves[place], ids, sources, weights, rows)
        return traverse_util.unflatten_dict(leaves)

    return jax.jit(grow, static_argnums=4, out_shardings=shardings)


def _grown(
    table: Float[Array, "old embed"],
    ids: Int[Array, "new"],
    sources: Int[Array, "new terms"],
    weights: Float[Array, "new terms"],
    rows: int,
) -> Float[Array, "rows embed"]:
    mean = jnp.mean(table.astype(jnp.float32), axis=0, dtype=jnp.float32)
    # Every added row begins as the mean; the rows of new tokens are then set.
    padding = jnp.broadcast_to(mean.astype(table.dtype), (rows - table.shape[0], table.shape[1]))
    grown = jnp.concatenate([table, padding])
    return grown.at[ids].set(_sums(table, sources, weights, mean).astype(table.dtype))


def _sums(
    table: Float[Array, "old embed"],
    sources: Int[Array, "new terms"],
    weights: Float[Array, "new terms"],
    mean: Float[Array, "embed"],
) -> Float[Array, "new embed"]:
    """The weighted sums, float32, with the mean as a last term: see `Growth`."""

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        source, weight = term
        rows = jnp.take(table, source, axis=0, mode="clip").astype(jnp.float32)
        return total + weight[:, None] * rows, None

    # Term by term: all at once would hold [new, terms, embed].
    zeros = jnp.zeros((sources.shape[0], table.shape[1]), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (sources.T, weights.T))
    return total + (1 - jnp.sum(weights, axis=1))[:, None] * mean


_sums_compiled = jax.jit(_sums)


def growth_change(growth: Growth) -> Change:
    """The change of tensors, for `transfer`."""
    gathered: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    # Only rows that a sum needs stay in memory, renumbered from 0.
    needed = np.unique(growth.sources)
    positions = np.searchsorted(needed, growth.sources).astype(np.int32)
    # Several threads write pieces at once: one of them reads the table, and the others wait for it.
    lock = threading.Lock()

    def old(name: str, source: TensorSource) -> tuple[np.ndarray, np.ndarray]:
        """The old rows that new rows need, and the mean of all; the table is read once."""
        with lock:
            if name not in gathered:
                found, total = [], 0.0
                width = source.read_rows(name, 0, 1).shape[1]
                for piece in pieces(name, (growth.old_rows, width), source.dtype(name)):
                    rows = source.read_rows(*piece)
                    inside = needed[(needed >= piece.start) & (needed < piece.stop)] - piece.start
                    found.append(rows[inside])
                    # float64, because a table may have hundreds of thousands of rows.
                    total = total + rows.astype(np.float32).sum(axis=0, dtype=np.float64)
                mean = (np.asarray(total) / growth.old_rows).astype(np.float32)
                gathered[name] = np.concatenate(found), mean
        return gathered[name]

    def values(piece: Piece, source: TensorSource) -> np.ndarray:
        # A piece may have old rows, rows of new tokens, and rows that no token has.
        kept_stop = min(piece.stop, growth.old_rows)
        table, mean = old(piece.name, source)
        result = np.broadcast_to(mean.astype(table.dtype), (piece.stop - piece.start, len(mean))).copy()
        if piece.start < kept_stop:
            result[: kept_stop - piece.start] = source.read_rows(piece.name, piece.start, kept_stop)
        inside = np.flatnonzero((growth.ids >= piece.start) & (growth.ids < piece.stop))
        if inside.size:
            # On the CPU, in whose memory the rows are.
            with lock, jax.default_device(jax.local_devices(backend="cpu")[0]):
                sums = _sums_compiled(table, positions[inside], growth.weights[inside], mean)
                result[growth.ids[inside] - piece.start] = np.asarray(sums.astype(table.dtype))
        return result

    def copied(name: str) -> bool:
        return tensor_place(name)[0] not in TABLES

    return Change(growth.digest, lambda name: name, copied, values)
