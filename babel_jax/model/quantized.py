"""Products in int8 or float8, in training: each row of an operand is scaled to the range of the type.

Qwix (google/qwix) does the work: it quantizes, multiplies and defines the backward pass. Its public interface
replaces products in a whole model. Here only the products of `Linear` are replaced, so `Linear` calls the
function that Qwix's interface calls.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from babel_jax.config import MatmulType
from babel_jax.errors import BadInput
from babel_jax.hardware import narrow_peaks

# Values, and gradients: float8 of gradients has more exponent bits and fewer of the mantissa (Micikevicius et
# al. 2022, FP8 Formats for Deep Learning).
_TYPES = {
    MatmulType.INT8: (jnp.int8, jnp.int8),
    MatmulType.FLOAT8: (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def quantized_product(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], matmul_dtype: MatmulType
) -> Float[Array, "*batch out"]:
    """x @ weight.T, in the type of x, from products in `matmul_dtype` (those of int8 are summed in int32).

    Each row of x (a token) and each row of the weight (an output feature) has a scale: its largest absolute
    value. The backward pass uses the narrow values of x and weight again. For each of its two products, the
    gradient is first multiplied with the scales of the other operand, and then its rows are quantized too.
    """
    # Imported where it is used: Qwix takes a second to import.
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

    of_values, of_gradients = _TYPES[matmul_dtype]
    config = DotGeneralQtConfig(
        lhs_qtype=of_values,
        rhs_qtype=of_values,
        dlhs_grad_qtype=of_gradients,
        drhs_grad_qtype=of_gradients,
    )
    rows = x.reshape(-1, x.shape[-1])
    out = dot_general_qt(rows, weight, (((1,), (1,)), ((), ())), config)
    return jnp.asarray(out).reshape(*x.shape[:-1], -1)


def check_matmul_type(matmul_dtype: MatmulType | None, device_kind: str) -> None:
    """Raises BadInput if devices of this kind are known to have no products in this type."""
    peaks = narrow_peaks(device_kind)
    if matmul_dtype is None or peaks is None or matmul_dtype in peaks:
        return
    valid = " or ".join(peaks)
    other = f"give {valid}, or leave it out" if peaks else "leave it out"
    raise BadInput(
        f"training.matmul_dtype = {matmul_dtype}: {device_kind} has no {matmul_dtype} products; {other}"
    )
