"""Run by test_devices.py in a process of its own: prints the losses and final parameters' sums of a run on each mesh of eight devices."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from babel_jax.config import ComputeType, ModelConfig, OptimizerSettings, TrainingSettings
from babel_jax.model.decoder import abstract_params, init_params
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import compiled_step, placed_state, state_shardings

CONFIG = ModelConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def run(mesh_sizes: dict[str, int], accumulation: int) -> dict[str, object]:
    """Losses of four steps, and the largest share of the moments that one device holds."""
    mesh = make_mesh(mesh_sizes)
    settings = OptimizerSettings()
    training = TrainingSettings(global_batch_size=16, gradient_accumulation=accumulation, compute_dtype=ComputeType.FLOAT32)
    optimizer = AdamW(settings, abstract_params(CONFIG))
    shardings = state_shardings(CONFIG, optimizer, mesh)
    params = jax.jit(init_params, static_argnums=0, out_shardings=shardings["params"])(CONFIG, jax.random.key(0))
    state = placed_state(optimizer, params, shardings)
    step = compiled_step(CONFIG, optimizer, settings, training, mesh)
    random = np.random.default_rng(0)
    losses = []
    for _ in range(4):
        lengths = random.integers(5, 30, (16, 1))
        segment_ids = np.where(np.arange(32) < lengths, 1, 2).astype(np.int32)
        tokens = random.integers(0, CONFIG.vocab_size, (16, 32), dtype=np.int32)
        batch = {"tokens": tokens, "segment_ids": segment_ids, "language": (np.arange(16) % 25).astype(np.int32)}
        state, metrics = step(state, global_batch(batch, mesh), jnp.float32(1e-2))
        losses.append(float(metrics["loss"]))
    leaf = state["opt_state"].inner_state.mu["model"]["layers"]["mlp"]["up_proj"]["weight"]
    share = leaf.addressable_shards[0].data.size / leaf.size
    return {"losses": losses, "share": share, "norm": float(metrics["gradient_norm"]), "compiled": step._cache_size()}


if __name__ == "__main__":
    print(json.dumps([run(sizes, accumulation) for sizes, accumulation in json.loads(sys.argv[1])]))
