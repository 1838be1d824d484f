"""Keys and values of tokens already seen, for all layers, so that each new token costs one pass over it alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from babel_jax.config import ModelConfig


class Cache(NamedTuple):
    """Keys (rotated already) and values; places from `filled` on are still free. Stacked over layers, as the parameters are."""

    keys: Float[Array, "layers batch source kv_heads head_dim"]
    values: Float[Array, "layers batch source kv_heads head_dim"]
    filled: Int[Array, ""]

    def extended(
        self, layer: Int[Array, ""], key: Float[Array, "batch time kv_heads head_dim"], value: Float[Array, "batch time kv_heads head_dim"]
    ) -> tuple["Cache", Float[Array, "batch source kv_heads head_dim"], Float[Array, "batch source kv_heads head_dim"]]:
        """The cache with the new keys and values of one layer, and all that this layer holds now. `filled` waits for the last layer."""
        start = (layer, 0, self.filled, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, key[None].astype(self.keys.dtype), start)
        values = jax.lax.dynamic_update_slice(self.values, value[None].astype(self.values.dtype), start)
        return Cache(keys, values, self.filled), keys[layer], values[layer]


def empty_cache(config: ModelConfig, batch: int, source: int, dtype: DTypeLike) -> Cache:
    """A cache for `source` tokens of each of `batch` sequences."""
    shape = (config.num_hidden_layers, batch, source, config.num_key_value_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
