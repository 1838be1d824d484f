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


@pytest.fixture(scope="session")
def tiny_model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@pytest.fixture
def tiny_config(tiny_model_config) -> ModelConfig:
    return tiny_model_config


@pytest.fixture
def write_model(write_model_of):
    return write_model_of


@pytest.fixture(scope="session")
def write_model_of(tiny_model_config):
    """Writes an HF folder without any of the code under test except config.json's: every bit of every tensor
    is random, NaNs among them.
    """

    def write(
        path: Path, config: ModelConfig = tiny_model_config, dtype: str | None = "bfloat16", shards: int = 2
    ) -> Path:
        path.mkdir(parents=True)
        random = np.random.default_rng(0)
        kinds = list(TYPES)
        tensors = {}
        for name, shape in tensor_shapes(config).items():
            # `dtype` None: types differ between leaves, not between a leaf's layers.
            kind = np.dtype(TYPES[dtype or kinds[sum(map(ord, name.rsplit(".", 2)[-2])) % 3]])
            size = int(np.prod(shape)) * kind.itemsize
            tensors[name] = np.frombuffer(random.bytes(size), kind).reshape(shape)
        names = sorted(tensors, key=lambda name: (name == "lm_head.weight", name))
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            (path / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
            )
        (path / "config.json").write_text(json.dumps(write_hf_config(config, dtype=dtype or "float32")))
        return path

    return write


@pytest.fixture
def read_bits():
    """All tensors of an HF folder as {name: (type, shape, bytes)}."""

    def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors |= {
                name: (str(value.dtype), value.shape, value.tobytes())
                for name, value in load_file(file).items()
            }
        return tensors

    return read
