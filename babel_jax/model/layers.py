"""The parts of a decoder layer that look at one token: norm, linear map, gated MLP; and rotary positions.

Weights are float32 masters, cast to the type of the activations where they are used.
"""

from collections.abc import Callable
from functools import partial
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from babel_jax.config import Activation, ModelConfig, RopeType
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import SINGLE_DEVICE, Parallelism
from babel_jax.model.parameters import declare
from babel_jax.model.quantized import QuantizedWeight, quantized_product
from babel_jax.model.rematerialization import mlp_value

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    Activation.SILU: jax.nn.silu,
    Activation.GELU: partial(jax.nn.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang and Sennrich 2019), in float32, rounded once to
    the type of x.
    """

    def __init__(self, size: int, axis: str | None, config: ModelConfig):
        """Over the last axis, of `size` and with the logical name `axis`."""
        self.weight = declare((size,), (axis,), jax.nn.initializers.constant(1.0 - config.norm_offset))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def __call__(
        self, x: Float[Array, "... size"], parallel: Parallelism = SINGLE_DEVICE
    ) -> Float[Array, "... size"]:
        """Normalized x, in its type.

        `parallel` is given where x differs between devices of the tensor axis.
        """
        # Squares of bfloat16 would keep 8 bits of the mean.
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.offset + parallel.column_parallel_input(self.weight[...]).astype(jnp.float32)
        result: Float[Array, "... size"] = (wide * scale * weight).astype(x.dtype)
        return result


def product(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """x @ weight.T, given and summed in `dtype` where it is set.

    As a product of two matrices: with several axes to sum over, XLA copies the transposed activations for the
    gradient of the weight.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jnp.einsum("ni,oi->no", rows, weight, preferred_element_type=dtype).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """x @ weight.T + bias.

    The weight is [out, in], as in Hugging Face checkpoints, so that conversion copies no element.
    """

    def __init__(self, in_size: int, out_size: int, axes: tuple[str, str], bias: bool, std: float):
        """`axes` are the logical names of the (out, in) axes; `std` is the standard deviation of initial
        weights.
        """
        self.weight = declare((out_size, in_size), axes, jax.nn.initializers.normal(std))
        if bias:
            self.bias = declare((out_size,), axes[:1], jax.nn.initializers.zeros)
        self.has_bias = bias
        # Megatron's two kinds: `out` is sharded over the tensor axis (column-parallel), or `in` is.
        self.row_parallel = axes[0] == "embed"

    def __call__(self, x: Float[Array, "... in"], execution: Execution) -> Float[Array, "... out"]:
        """The map, in the type of x."""
        weight = self.weight.get_value()
        if isinstance(weight, QuantizedWeight):
            out = quantized_product(x, weight)
        else:
            out = product(x, weight.astype(x.dtype))
        if self.row_parallel:
            out = execution.parallel.row_parallel_sum(out)
        return out + self.bias[...].astype(x.dtype) if self.has_bias else out


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU, or GEGLU with another activation (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(hidden, inner, ("mlp", "embed"), config.mlp_bias, std)
        self.up_proj = Linear(hidden, inner, ("mlp", "embed"), config.mlp_bias, std)
        self.down_proj = Linear(inner, hidden, ("embed", "mlp"), config.mlp_bias, std)
        self.activation = config.hidden_act

    def __call__(
        self, x: Float[Array, "batch time embed"], execution: Execution
    ) -> Float[Array, "batch time embed"]:
        """The MLP, in the type of x."""
        x = execution.parallel.column_parallel_input(x)
        gate = mlp_value(self.gate_proj(x, execution), CheckpointName.GATE_PROJ, execution)
        up = mlp_value(self.up_proj(x, execution), CheckpointName.UP_PROJ, execution)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, execution)


def softcapped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap): close to x near 0, never beyond the cap (Gemma 2, section 2).
    x itself for None.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, "half"]:
    """Radians per position for each pair of a head's dimensions, float32 (Su et al. 2021; pairs are (i, i +
    head_dim / 2), as in GPT-NeoX).

    `linear` divides all frequencies by the factor (Chen et al. 2023). `llama3` divides frequencies of
    wavelengths over original_max_position_embeddings / low_freq_factor, keeps frequencies of wavelengths
    under original_max_position_embeddings / high_freq_factor, and blends in between (Llama 3.1 report,
    section 3.4).
    """
    # In float64 and rounded once, because a small error of a frequency grows with the position.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.rope_type is RopeType.LINEAR:
        frequencies = frequencies / scaling.factor
    elif scaling.rope_type is RopeType.LLAMA3:
        # How often each pair turns within the original window: slow pairs are scaled, fast ones kept.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
    elif scaling.rope_type is not RopeType.DEFAULT:
        assert_never(scaling.rope_type)
    return frequencies.astype(np.float32)


def rope_tables(
    config: ModelConfig, positions: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time half"], ...]:
    """Cosines and sines of the rotation at each position, float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch time heads head_dim"],
    cosine: Float[Array, "#batch time half"],
    sine: Float[Array, "#batch time half"],
) -> Float[Array, "batch time heads head_dim"]:
    """x with each pair of dimensions turned by the angle of its position. Float32 inside, the type of x
    outside.
    """
    # Halves, and not neighbours, are the pairs: Hugging Face's layout of weights.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
