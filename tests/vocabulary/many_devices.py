"""Run by test_plan.py in a process of its own: tables grow on a mesh whose every axis is over 1, `ring` too,
and on one device. Prints the largest difference, the parts of the devices, and the memory of the program.
"""

import json
import sys

import jax
import numpy as np
from flax import traverse_util

from babel_jax.config import ModelConfig
from babel_jax.model.shapes import TABLES
from babel_jax.training.mesh import make_mesh, param_shardings
from babel_jax.vocabulary.growth import Growth, grow_config, growing

EVERY_AXIS = {"data": 2, "fsdp": 4, "ring": 2, "context": 2, "tensor": 2}
OLD_ROWS, ROWS = 4096, 4352  # more than the temporaries of anything else


def grown(config: ModelConfig, growth: Growth, sizes: dict[str, int], devices: int) -> tuple[object, int]:
    """The larger tables on a mesh, and the bytes of temporaries on each device."""
    mesh = make_mesh(sizes, jax.devices()[:devices])
    before, after = (
        tables_of(param_shardings(shape, mesh)) for shape in (config, grow_config(config, growth))
    )
    random = np.random.default_rng(1)
    table = {place: random.random((OLD_ROWS, config.hidden_size), np.float32) for place in sorted(before)}
    params = traverse_util.unflatten_dict(jax.device_put(table, before))
    program = growing(traverse_util.unflatten_dict(after))
    memory = program.lower(params, *growth.arguments).compile().memory_analysis()
    return program(params, *growth.arguments), memory.temp_size_in_bytes


def tables_of(tree: object) -> dict[tuple[str, ...], object]:
    """Embedding and head by their places."""
    return {place: leaf for place, leaf in traverse_util.flatten_dict(tree).items() if place in TABLES}


def compared(tied: bool) -> dict[str, object]:
    """The figures for one kind of head."""
    config = ModelConfig(
        vocab_size=OLD_ROWS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    random = np.random.default_rng(0)
    # An odd number of new rows, in both halves of the table; the last ones have no token.
    ids = np.array([7, 2050, *range(OLD_ROWS, OLD_ROWS + 201)], np.int32)
    weights = random.random((len(ids), 5), np.float32)
    weights[3] = 0
    growth = Growth(ids, random.integers(0, OLD_ROWS, (len(ids), 5), np.int32), weights, OLD_ROWS, ROWS)
    alone, _ = grown(config, growth, {}, 1)
    together, temporaries = grown(config, growth, EVERY_AXIS, 32)
    ours, theirs = (jax.tree.leaves(jax.device_get(params)) for params in (together, alone))
    return {
        "difference": max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)),
        "shards": [list(leaf.addressable_shards[0].data.shape) for leaf in jax.tree.leaves(together)],
        "temporaries": temporaries,
        "table_bytes": ROWS * config.hidden_size * 4,
    }


if __name__ == "__main__":
    json.dump({"tied": compared(True), "untied": compared(False)}, sys.stdout)
