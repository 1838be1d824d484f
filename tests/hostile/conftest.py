import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from babel_jax.config import ModelConfig
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.layout import tensor_shapes

TINY = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture
def write_model():
    """Writes an HF folder of a tiny model: (path, config, dtype, shards)."""

    def write(path: Path, config: ModelConfig = TINY, dtype: str = "float32", shards: int = 2) -> Path:
        path.mkdir(parents=True)
        random = np.random.default_rng(0)
        tensors = {
            name: random.normal(size=shape).astype(dtype) for name, shape in tensor_shapes(config).items()
        }
        names, index = list(tensors), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            save_file(
                {name: tensors[name] for name in names[shard::shards]}, path / file, metadata={"format": "pt"}
            )
            index |= dict.fromkeys(names[shard::shards], file)
        if shards > 1:
            (path / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": index})
            )
        (path / "config.json").write_text(json.dumps(write_hf_config(config, dtype=dtype, eos_token_id=1)))
        return path

    return write
