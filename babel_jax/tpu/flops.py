"""The FLOPs that a traced program runs, recomputation included."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from babel_jax.config import MatmulType, ModelConfig
from babel_jax.model.attention_kernels import splash_block

_LANES = 128  # of a matrix unit


def program_flops(jaxpr: Any, config: ModelConfig, seq_len: int, narrow: MatmulType | None = None) -> float:
    """The FLOPs of matrix products in a jaxpr, times the lengths of its scans. Inside `shard_map`, shapes are
    those of one device.

    Pallas kernels are splash attention over windows of `seq_len` tokens; the blocks that they do not skip
    count. narrow: counts only products in this type.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        # Remat keeps the results of this equation, so it is not run again.
        if not equation.outvars:
            continue
        if name == "dot_general":
            if narrow is not None and not equation.invars[0].aval.dtype.name.startswith(narrow):
                continue
            # Two FLOPs, a product and a sum, for each element of the result and each contracted index.
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[axis] for axis in contracted)
            )
        elif name == "pallas_call":
            total += 0.0 if narrow is not None else _splash_flops(equation, config, seq_len)
        elif name == "cond":
            # Only one branch runs; the largest is counted.
            total += max(
                program_flops(branch.jaxpr, config, seq_len, narrow) for branch in equation.params["branches"]
            )
        else:
            times = equation.params["length"] if name == "scan" else 1
            inner = _inner(equation.params)
            total += times * sum(program_flops(part, config, seq_len, narrow) for part in inner)
    return total


def pallas_flops(jaxpr: Any, config: ModelConfig, seq_len: int) -> dict[str, float]:
    """The FLOPs of one run of each Pallas kernel in a jaxpr, by the kernel's name, with heads filled up to
    128. Of kernels with one name, the mean counts.
    """
    found: dict[str, list[float]] = {}
    waiting = [jaxpr]
    while waiting:
        for equation in waiting.pop().eqns:
            if equation.primitive.name == "pallas_call":
                # Smaller heads are filled up to the lanes of a matrix unit.
                head_dim = _float_shapes(equation)[0][-1]
                filled = -(-head_dim // _LANES) * _LANES / head_dim
                flops = filled * _splash_flops(equation, config, seq_len)
                found.setdefault(_kernel_name(equation), []).append(flops)
            else:
                waiting += _inner(equation.params)
    return {name: sum(flops) / len(flops) for name, flops in found.items()}


def _kernel_name(equation: Any) -> str:
    return str(equation.params["name"])


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for element in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(element, "jaxpr", element)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _float_shapes(equation: Any) -> list[tuple[int, ...]]:
    """The shapes of a kernel's arguments of floating-point numbers: queries, keys, values and others."""
    shapes = []
    for variable in equation.invars:
        if jnp.issubdtype(variable.aval.dtype, jnp.floating):
            shapes.append(variable.aval.shape)
    return shapes


def _splash_flops(equation: Any, config: ModelConfig, seq_len: int) -> float:
    """The FLOPs of splash attention: two products of each visible block of scores with the heads forward,
    five backward (one kernel).

    If `context` splits windows, each device has a part of the first half and a part of the second; the mean
    over devices counts.
    """
    query, key = _float_shapes(equation)[:2]
    (*batch, heads, time, head_dim), source = query, key[-2]
    block_q, block_kv = (splash_block(tokens, head_dim) for tokens in (time, source))
    products = 5 if "dkv" in equation.params["name"] else 2
    # With a context axis, a kernel has queries of one half of the window: the firsts of all devices are
    # averaged.
    firsts = range(source // 2 if time < source == seq_len else 0, source, time)
    areas = []
    for window in config.windows:
        areas += [_visible_area(window, first, time, block_q, block_kv) for first in firsts]
    result: float = 2.0 * products * math.prod(batch) * heads * head_dim * sum(areas) / len(areas)
    return result


def _visible_area(window: int | None, start: int, time: int, block_q: int, block_kv: int) -> int:
    """The number of scores in blocks with any visible score, for `time` queries from position `start` on."""
    area = 0
    for first in range(start, start + time, block_q):
        begin = 0 if window is None else max(0, first - window + 1)
        area += ((first + block_q - 1) // block_kv - begin // block_kv + 1) * block_q * block_kv
    return area
