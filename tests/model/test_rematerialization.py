"""Names by which rematerialization keeps values: each is in the program, or a policy would keep nothing."""

import re

import jax
import jax.numpy as jnp
import pytest

from babel_jax.config import AttentionKernel, MatmulType, ModelConfig, Remat
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.decoder import describe
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import WEIGHT_AXES, Parallelism, mesh_axes
from babel_jax.training.loss import summed_loss

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=256,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
TOKENS = 512


def shard(parameter):
    """A parameter as one of two devices of the context axis holds it."""
    axes = mesh_axes(parameter.logical_axes)
    shape = [
        size // 2 if split == WEIGHT_AXES else size for size, split in zip(parameter.shape, axes, strict=True)
    ]
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)


@pytest.mark.parametrize(
    ("kernel", "matmul_dtype"),
    [(AttentionKernel.XLA, None), (AttentionKernel.SPLASH, None), (AttentionKernel.XLA, MatmulType.INT8)],
)
def test_every_name_is_in_the_program_of_a_layer(kernel, matmul_dtype):
    parallel = Parallelism((("context", 2),), gather_stages=(("context",),), scatter_stages=(("context",),))
    execution = Execution(remat=Remat.MLP, kernel=kernel, parallel=parallel, matmul_dtype=matmul_dtype)

    def loss(params, batch):
        return summed_loss(CONFIG, params, batch, execution=execution)[0]

    batch = {name: jax.ShapeDtypeStruct((1, TOKENS), jnp.int32) for name in ("tokens", "segment_ids")}
    program = jax.make_jaxpr(jax.grad(loss), axis_env=[("context", 2)])
    text = str(program(jax.tree.map(shard, describe(CONFIG)), batch))
    # Only narrow products look for the largest value of a token.
    absent = {CheckpointName.TOKEN_MAXIMA} if matmul_dtype is None else set()
    assert set(re.findall(r"name\[name=(\w+)\]", text)) >= {
        str(name) for name in set(CheckpointName) - absent
    }


def test_the_backward_pass_does_not_look_for_the_largest_values_again():
    """The program has as many maxima as one that recomputes nothing."""

    def maxima(remat):
        execution = Execution(remat=remat, matmul_dtype=MatmulType.INT8)

        def loss(params, batch):
            return summed_loss(CONFIG, params, batch, execution=execution)[0]

        params = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, jnp.float32), describe(CONFIG))
        batch = {name: jax.ShapeDtypeStruct((1, TOKENS), jnp.int32) for name in ("tokens", "segment_ids")}
        return str(jax.make_jaxpr(jax.grad(loss))(params, batch)).count("reduce_max[")

    assert maxima(Remat.MLP) == maxima(Remat.NONE)
