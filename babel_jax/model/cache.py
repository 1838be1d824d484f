"""The key-value cache: keys and values of earlier tokens, for all layers. A new token costs one forward pass
of one token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from babel_jax.config import ModelConfig


class Cache(NamedTuple):
    """Keys (after rotary positions) and values, stacked over layers as the parameters are. The first `filled`
    entries of the source axis are used.

    The entries of one head are adjacent, in the order in which attention reads them. In another order every
    new token would transpose the whole cache.
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
        """The cache with new keys and values of one layer; and all keys and values of this layer.

        `filled` stays as it is: the caller raises it after the last layer.
        """
        # Every layer writes at the same place of the source axis.
        start = (layer, 0, 0, self.filled, 0)
        new_keys, new_values = (new.swapaxes(1, 2)[None].astype(self.keys.dtype) for new in (key, value))
        keys = jax.lax.dynamic_update_slice(self.keys, new_keys, start)
        values = jax.lax.dynamic_update_slice(self.values, new_values, start)
        return Cache(keys, values, self.filled), keys[layer].swapaxes(1, 2), values[layer].swapaxes(1, 2)


def empty_cache(config: ModelConfig, batch: int, source: int, dtype: DTypeLike, parts: int = 1) -> Cache:
    """A cache for `batch` sequences of up to `source` tokens. With `parts` devices that share the heads: the
    cache of one device.
    """
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads // parts, source, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
