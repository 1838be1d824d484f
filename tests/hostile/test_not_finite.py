"""Models whose weights are NaN, infinite or too large to compute with: one line, and never numbers or text
that mean nothing.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from babel_jax.cli import main
from babel_jax.config import Family, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import score
from babel_jax.inference.generation import generate
from babel_jax.training.mesh import make_mesh
from tests.compiled import init_params
from tests.hostile.test_model_folders import folder

CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def test_a_model_with_a_nan_gives_no_text(tmp_path, capsys):
    source = folder(tmp_path / "source", Family.LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((source / "model.safetensors.index.json").read_text())
    file = source / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 2] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["generate", str(source), "w1 w2", "--max-new-tokens", "2", "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "logits are not finite" in said.err


def test_logits_that_are_nan_give_neither_text_nor_scores():
    params = init_params(CONFIG, jax.random.key(0))
    assert len(generate(CONFIG, params, [[1, 2]], 2)[0]) == 2
    damaged = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    for settings in ({}, {"temperature": 1.0}):
        with pytest.raises(BadInput, match="logits are not finite"):
            generate(CONFIG, damaged, [[1, 2], [3]], 2, **settings)
    scored = [Scored(np.array([1, 2, 3]), np.array([4]))]
    with pytest.raises(BadInput, match="logits are not finite"):
        score(CONFIG, damaged, scored, make_mesh({}), 64)
