"""Run by test_devices.py in a process of its own: prints the losses, and more, of a run on each of several
meshes of eight devices.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from babel_jax.config import Family, ModelConfig, OptimizerSettings, TrainingSettings
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput
from babel_jax.model import cross_entropy as vocabulary
from babel_jax.model.decoder import abstract_params, init_params
from babel_jax.training.corruption import BitChecks
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import compiled_step, placed_state, state_shardings

CONFIG = ModelConfig(
    family=Family.QWEN3,  # its norms of heads, whose gradients the devices of the tensor axis share
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    final_logit_softcapping=5.0,
)


def run(mesh_sizes: dict[str, int], **settings: object) -> dict[str, object]:
    """Losses of three steps, the last norm of gradients, and the largest share of a moment that one device
    holds.
    """
    mesh = make_mesh(mesh_sizes, jax.devices()[: settings.pop("devices", None)])
    training = parse_settings(
        TrainingSettings, {"global_batch_size": 16, "compute_dtype": "float32", **settings}, "test"
    )
    settings = OptimizerSettings(z_loss=1e-3)
    optimizer = AdamW(settings, abstract_params(CONFIG))
    shardings = state_shardings(CONFIG, optimizer, mesh, training.offload_optimizer_state)
    params = jax.jit(init_params, static_argnums=0, out_shardings=shardings.params)(CONFIG, jax.random.key(0))
    state = placed_state(optimizer, params, shardings, 25)
    step = compiled_step(CONFIG, optimizer, settings, training, mesh)
    random = np.random.default_rng(0)
    losses = []
    for _ in range(3):
        lengths = random.integers(5, 30, (16, 1))
        segment_ids = np.where(np.arange(32) < lengths, 1, 2).astype(np.int32)
        tokens = random.integers(0, CONFIG.vocab_size, (16, 32), dtype=np.int32)
        batch = {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "language": (np.arange(16) % 25).astype(np.int32),
        }
        state, metrics = step(state, global_batch(batch, mesh), jnp.float32(1e-2))
        losses.append(float(metrics["loss"]))
    narrow_gathers = 0
    if training.matmul_dtype is not None:
        program = step.lower(state, global_batch(batch, mesh), jnp.float32(1e-2)).compile().as_text()
        narrow_gathers = len(re.findall(r"= s8\S+ all-gather\(", program))
    checks = BitChecks(CONFIG, settings, training, mesh)
    checks.check_gradients(3, state.params, global_batch(batch, mesh))
    checks.check_replicas(3, state.params)
    leaf = state.opt_state.inner_state.mu["model"]["layers"]["mlp"]["up_proj"]["weight"]
    share = leaf.addressable_shards[0].data.size / leaf.size
    return {
        "losses": losses,
        "share": share,
        "memory": leaf.sharding.memory_kind,
        "norm": float(metrics["gradient_norm"]),
        "narrow_gathers": narrow_gathers,
        "compiled": step._cache_size(),
        "other_replicas": refusal_of_other_replicas(checks, state.params, mesh),
    }


def refusal_of_other_replicas(checks: BitChecks, params: dict, mesh: jax.sharding.Mesh) -> str:
    """What is said where the device that comes last in the mesh holds one other bit of the first row of a
    norm.
    """
    leaf = params["model"]["norm"]["weight"]
    parts = []
    for shard in leaf.addressable_shards:
        values = np.array(shard.data)
        if shard.device == mesh.devices.flat[-1]:
            values.view(np.uint32)[0] ^= 1
        parts.append(jax.device_put(values, shard.device))
    other = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
    try:
        checks.check_replicas(7, params | {"model": params["model"] | {"norm": {"weight": other}}})
    except BadInput as found:
        return str(found)
    return ""


if __name__ == "__main__":
    vocabulary._LARGEST_PIECE = 2**10  # several pieces of the vocabulary on all meshes, one device included
    print(json.dumps([run(sizes, **settings) for sizes, settings in json.loads(sys.argv[1])]))
