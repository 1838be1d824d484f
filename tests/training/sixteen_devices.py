"""Run by test_new_rows.py in a process of its own: two steps that train the rows of new tokens alone, on a
mesh whose every axis is over 1. Prints the losses, the paths of changed leaves and rows, and the shapes of
moments.
"""

import json
import sys

import jax
import numpy as np

from babel_jax.config import ModelConfig, OptimizerSettings, Trained, TrainingSettings
from babel_jax.config.file import parse_settings
from babel_jax.model.decoder import abstract_params, init_params
from babel_jax.training.mesh import global_batch, make_mesh
from babel_jax.training.optimizer import AdamW
from babel_jax.training.step import compiled_step, placed_state, state_shardings

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# In both halves of the table, and an odd number of them.
NEW_ROWS = (5, 40, 60, 61, 95)


def run(sizes: dict[str, int], devices: int) -> dict[str, object]:
    """The figures of two steps on a mesh."""
    mesh = make_mesh(sizes, jax.devices()[:devices])
    training = parse_settings(TrainingSettings, {"global_batch_size": 8, "compute_dtype": "float32"}, "test")
    settings = OptimizerSettings()
    optimizer = AdamW(settings, abstract_params(CONFIG), Trained.NEW_ROWS, new_rows=NEW_ROWS)
    shardings = state_shardings(CONFIG, optimizer, mesh)
    params = jax.jit(init_params, static_argnums=0, out_shardings=shardings.params)(CONFIG, jax.random.key(0))
    before = jax.device_get(params)
    state = placed_state(optimizer, params, shardings, 25)
    step = compiled_step(CONFIG, optimizer, settings, training, mesh)
    random, losses = np.random.default_rng(0), []
    for _ in range(2):
        batch = {
            "tokens": random.integers(0, 96, (8, 32), dtype=np.int32),
            "segment_ids": np.ones((8, 32), np.int32),
            "language": np.zeros(8, np.int32),
        }
        state, metrics = step(state, global_batch(batch, mesh), jax.numpy.float32(1e-2))
        losses += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    changed: dict[str, list[int]] = {}
    for (path, after), leaf in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(state.params)),
        jax.tree.leaves(before),
        strict=True,
    ):
        rows = np.flatnonzero((after != leaf).reshape(len(leaf), -1).any(axis=1)).tolist()
        if rows:
            changed[jax.tree_util.keystr(path, simple=True, separator="/")] = rows
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    return {
        "losses": losses,
        "changed": changed,
        "moments": [list(leaf.shape) for leaf in moments],
        "shards": [list(leaf.addressable_shards[0].data.shape) for leaf in moments],
        "tables": [np.asarray(leaf).tolist() for leaf in (state.params["model"]["embed_tokens"]["weight"],)],
    }


if __name__ == "__main__":
    results = [run({}, 1), run({"data": 2, "fsdp": 2, "context": 2, "tensor": 2}, 16)]
    json.dump(results, sys.stdout)
