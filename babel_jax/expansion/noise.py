"""The noise of new layers: the table that it is drawn from, and rows with noise in NumPy, without JAX.

To import JAX, and to compile a program for each shape, takes longer than to draw the noise of a small model.
The random numbers are those of `jax.random` (Threefry-2x32, Salmon et al. 2011), so `noisy_rows` has the bits
of `expansion.apply`, which computes with JAX.
"""

import functools
import statistics
import zlib
from typing import Any

import numpy as np

from babel_jax.model.shapes import Place

# By the paper: the rotations of four rounds and of the next four, and a constant of the key schedule.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_CONSTANT = np.uint32(0x1BD11BDA)
# Numbers that are computed at a time: enough to hide Python's time, and few enough for the processor's cache.
_NUMBERS = 2**16
# A sum with a table value over this is 0 or a normal float32: the spacing of such values is over 2**-123.
_LEAST = 2.0**-100
_TYPES = ("bfloat16", "float16", "float32")


@functools.cache
def quantiles() -> np.ndarray:
    """65,536 equally likely values of a normal distribution with mean 0 and standard deviation 1.

    Noise is drawn from this table, because functions such as erf_inv differ in the last bit between shapes,
    back ends and versions.
    """
    normal = statistics.NormalDist()
    values = np.array([normal.inv_cdf((number + 0.5) / 2**16) for number in range(2**16)])
    result: np.ndarray = values / values.std()
    return result


@functools.lru_cache(8)
def noise_table(mean: float, std: float) -> np.ndarray:
    """The 65,536 values of noise, float32."""
    return (mean + std * quantiles()).astype(np.float32)


def path_hash(place: Place) -> int:
    """A number for a leaf's path. It is part of the key, so no two leaves get the same noise."""
    return zlib.crc32("/".join(place).encode())


def is_exact_in_numpy(table: np.ndarray, dtype: np.dtype) -> bool:
    """True if sums with this table have the same bits in NumPy and in XLA for CPU, which takes denormals for
    zeros.
    """
    return str(dtype) in _TYPES and bool(np.abs(table).min() > _LEAST)


def noisy_rows(
    rows: np.ndarray, seed: int, path: int, target: int, table: np.ndarray, first: int
) -> np.ndarray:
    """Rows of a tensor with noise, from row `first` on. path: `path_hash`. target: the position of the layer.

    Each row has its own random stream, so that a piece gets the same noise as the whole.
    """
    key = np.zeros((1, 1), np.uint32), np.full((1, 1), seed, np.uint32)
    for number in (path, target):
        key = _fold_in(key, np.full((1, 1), number, np.uint32))
    flat = rows.reshape(len(rows), -1)
    width = flat.shape[1]
    result = np.empty_like(flat)
    height = max(1, _NUMBERS // max(1, width))
    for start in range(0, len(flat), height):
        block = flat[start : start + height]
        numbers = (first + start + np.arange(len(block), dtype=np.uint32))[:, None]
        # Within a row a number's counter is its position.
        counters = np.broadcast_to(np.arange(width, dtype=np.uint32), block.shape).copy()
        left, right = _threefry(_fold_in(key, numbers), np.zeros(block.shape, np.uint32), counters)
        values = table[(left ^ right).astype(np.uint16)]
        # NaNs and infinities are no mistake here: they stay as they are.
        with np.errstate(all="ignore"):
            values += block.astype(np.float32)
            result[start : start + height] = values.astype(rows.dtype)
    return result.reshape(rows.shape)


def _fold_in(key: tuple[np.ndarray, np.ndarray], numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`jax.random.fold_in`: a new key for each of the numbers."""
    return _threefry(key, np.zeros_like(numbers), numbers.copy())


def _threefry(key: tuple[np.ndarray, np.ndarray], left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 of 20 rounds, of counters (left, right), which are overwritten by the result."""
    schedule = (*key, key[0] ^ key[1] ^ _KEY_CONSTANT)
    left += schedule[0]
    right += schedule[1]
    shifted = np.empty_like(right)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left += right
            # right = right rotated by `rotation` bits, then xor left; in place, because new arrays take
            # longer than the operation.
            np.left_shift(right, np.uint32(rotation), out=shifted)
            np.right_shift(right, np.uint32(32 - rotation), out=right)
            np.bitwise_or(right, shifted, out=right)
            np.bitwise_xor(right, left, out=right)
        left += schedule[(group + 1) % 3]
        right += schedule[(group + 2) % 3] + np.uint32(group + 1)
    return left, right
