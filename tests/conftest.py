"""Fixtures for all tests: tiny models, and the bridge from `transformers` models, which are the reference."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import settings

from babel_jax.config import Family, LayerType, ModelConfig, RopeType
from babel_jax.model.decoder import init_params

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# The first example of a property compiles, so a deadline for each says nothing.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_config: ModelConfig) -> Any:
    return jax.jit(init_params, static_argnums=0)(tiny_config, jax.random.key(0))


@pytest.fixture(scope="session")
def stacked_tree() -> Callable[[Any], Any]:
    """Our parameter tree of a `transformers` model, or of its gradients."""

    def convert(tensors: dict[str, Any]) -> Any:
        single: dict[str, jax.Array] = {}
        layers: dict[str, dict[int, np.ndarray]] = {}
        for name, tensor in tensors.items():
            value = tensor.detach().float().numpy()
            parts = name.split(".")
            if parts[1] == "layers":
                layers.setdefault("/".join([*parts[:2], *parts[3:]]), {})[int(parts[2])] = value
            else:
                single["/".join(parts)] = jnp.asarray(value)
        stacked = {path: jnp.asarray(np.stack([by_index[i] for i in range(len(by_index))])) for path, by_index in layers.items()}
        return traverse_util.unflatten_dict(single | stacked, sep="/")

    return convert


@pytest.fixture(scope="session")
def reference_model() -> Callable[..., Any]:
    """A `transformers` model of a ModelConfig, float32, eager attention, with every parameter random (norms and biases too)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def build(config: ModelConfig, seed: int = 0, std: float = 0.1) -> Any:
        scaling = config.rope_scaling
        rope: dict[str, Any] = {"rope_type": str(scaling.rope_type), "rope_theta": config.rope_theta}
        if scaling.rope_type is not RopeType.DEFAULT:
            rope["factor"] = scaling.factor
        if scaling.rope_type is RopeType.LLAMA3:
            rope |= scaling.model_dump(include={"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
        same = config.model_dump(
            include={
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            }
        )  # fmt: skip
        if config.family is Family.QWEN2:
            types = [str(LayerType.FULL if window is None else LayerType.SLIDING) for window in config.windows]
            hf_config = transformers.Qwen2Config(
                **same, rope_parameters=rope, layer_types=types, use_sliding_window=True, sliding_window=config.sliding_window or 4096
            )
            kind = transformers.Qwen2ForCausalLM
        else:
            hf_config = transformers.LlamaConfig(**same, rope_parameters=rope, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)
            kind = transformers.LlamaForCausalLM
        hf_config._attn_implementation = "eager"
        model = kind(hf_config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ("norm" in name))
        return model

    return build
