import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from babel_jax.config import ModelConfig
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.layout import tensor_shapes

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.fixture
def small_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@pytest.fixture
def write_small_model(small_config):
    """Writes an HF folder of one safetensors file with small normal values in every tensor, biases and norms
    too.
    """

    def write(path: Path, config: ModelConfig = small_config, dtype: str = "float32", **hf_keys) -> Path:
        path.mkdir(parents=True)
        random = np.random.default_rng(0)
        tensors = {
            name: (random.normal(size=shape) * 0.05 + name.endswith("norm.weight")).astype(TYPES[dtype])
            for name, shape in tensor_shapes(config).items()
        }
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**write_hf_config(config, dtype=dtype), **hf_keys}))
        return path

    return write


@pytest.fixture
def read_tensors():
    """All tensors of an HF folder by name."""

    def read(path: Path) -> dict[str, np.ndarray]:
        return {
            name: value
            for file in sorted(path.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }

    return read
