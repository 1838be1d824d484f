"""How a forward pass is computed: settings that change speed, memory and rounding, and never the function."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from babel_jax.config import AttentionKernel, MatmulType, Remat
from babel_jax.model.parallel import SINGLE_DEVICE, Parallelism


@dataclass(frozen=True)
class Execution:
    """Hashable, so that it can be a static argument of `jax.jit`. The default is a plain float32 pass on one
    device.

    `compute_dtype`: type of activations and products. `remat`: what is kept for the backward pass.
    `kernel`: what computes attention, never `auto`. `parallel`: the mesh axes that the pass runs on.
    `scan_layers`: one compiled layer in a loop; False writes every layer into the program.
    `matmul_dtype`: type of the products with weights inside layers, if narrower than `compute_dtype`.
    `tokens_minor`: kept values of the MLP have the tokens along lanes in memory (see `rematerialization`).
    """

    compute_dtype: DTypeLike = jnp.float32
    remat: Remat = Remat.NONE
    kernel: AttentionKernel = AttentionKernel.XLA
    parallel: Parallelism = SINGLE_DEVICE
    scan_layers: bool = True
    matmul_dtype: MatmulType | None = None
    tokens_minor: bool = False


PLAIN = Execution()
