"""Keys and values of tokens already seen, for all layers, so that each new token costs one pass over it
alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from babel_jax.config import ModelConfig


class Cache(NamedTuple):
    """Keys (rotated already) and values; places from `filled` on are still free. Stacked over layers, as the
    parameters are.

    What one head has seen lies together, as attention reads it: otherwise every new token would turn the
    whole cache round.
    """

    keys: Float[Array, "layers batch kv_heads source head_dim"]
    values: Float[Array, "layers batch kv_heads source head_dim"]
    filled: Int[Array, ""]

    def extended(
        self,
        layer: Int[Array, ""],
        key: Float[Array, "batch time kv_heads head_dim"],
        value: Float[Array, "batch time kv_heads head_dim"],
    ) -> tuple[
        "Cache",
        Float[Array, "batch source kv_heads head_dim"],
        Float[Array, "batch source kv_heads head_dim"],
    ]:
        """The cache with the new keys and values of one layer, and all that this layer holds now.

        `filled` waits for the last layer.
        """
        start = (layer, 0, 0, self.filled, 0)
        new_keys, new_values = (new.swapaxes(1, 2)[None].astype(self.keys.dtype) for new in (key, value))
        keys = jax.lax.dynamic_update_slice(self.keys, new_keys, start)
        values = jax.lax.dynamic_update_slice(self.values, new_values, start)
        return Cache(keys, values, self.filled), keys[layer].swapaxes(1, 2), values[layer].swapaxes(1, 2)


def empty_cache(config: ModelConfig, batch: int, source: int, dtype: DTypeLike, parts: int = 1) -> Cache:
    """A cache for `source` tokens of each of `batch` sequences; of `parts` devices that share the heads, that
    of one.
    """
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads // parts, source, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
