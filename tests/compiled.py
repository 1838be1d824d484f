"""Initial parameters and the forward pass, each one compiled program. Without `jit`, every operation compiles
for every shape: seconds for each length of a text.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from babel_jax.config import ModelConfig
from babel_jax.model import decoder

init_params = jax.jit(decoder.init_params, static_argnames=("config", "dtype"))
forward = jax.jit(decoder.forward, static_argnames=("config", "execution"))

LENGTHS = 64  # tokens: documents are filled up to a multiple


def logits_alone(config: ModelConfig, params: Any, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The logits of one document without any other: float64[time, vocab]. No token sees those after it, so
    the document may be filled up with zeros.
    """
    filled = np.zeros(-(-len(ids) // LENGTHS) * LENGTHS, np.int32)
    filled[: len(ids)] = ids
    return np.asarray(forward(config, params, jnp.asarray(filled)[None])[0, : len(ids)], np.float64)
