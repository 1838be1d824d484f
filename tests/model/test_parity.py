"""Logits and gradients against `transformers`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from babel_jax.config import Family, LayerType, ModelConfig, RopeScaling, RopeType
from babel_jax.model.decoder import abstract_params, forward

torch = pytest.importorskip("torch")

FULL, SLIDING = LayerType.FULL, LayerType.SLIDING
BASE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "qwen2": ModelConfig(**BASE, num_attention_heads=4, num_key_value_heads=2),
    "qwen2_grouped_7_to_1": ModelConfig(
        **(BASE | {"hidden_size": 112}), num_attention_heads=14, num_key_value_heads=2
    ),
    "qwen2_tied_eps": ModelConfig(
        **BASE, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "qwen2_head_dim": ModelConfig(
        **BASE, num_attention_heads=4, num_key_value_heads=4, head_dim=24, rope_theta=10_000.0
    ),
    "qwen2_some_sliding": ModelConfig(
        **(BASE | {"num_hidden_layers": 4}),
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=7,
        layer_types=(FULL, SLIDING, FULL, SLIDING),
    ),
    "qwen2_all_sliding": ModelConfig(
        **BASE,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        layer_types=(SLIDING, SLIDING, SLIDING),
    ),
    "llama": ModelConfig(
        **BASE, family=Family.LLAMA, num_attention_heads=8, num_key_value_heads=4, rope_theta=10_000.0
    ),
    "llama_tied_scaled": ModelConfig(
        **BASE,
        family=Family.LLAMA,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(rope_type=RopeType.LLAMA3, factor=8.0, original_max_position_embeddings=32),
    ),
    "llama_biases_linear": ModelConfig(
        **BASE,
        family=Family.LLAMA,
        num_attention_heads=4,
        num_key_value_heads=2,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope_scaling=RopeScaling(rope_type=RopeType.LINEAR, factor=4.0),
    ),
    "qwen3": ModelConfig(
        **BASE, family=Family.QWEN3, num_attention_heads=4, num_key_value_heads=2, head_dim=24
    ),
    "qwen3_biases_sliding": ModelConfig(
        **BASE,
        family=Family.QWEN3,
        num_attention_heads=4,
        num_key_value_heads=1,
        qkv_bias=True,
        o_bias=True,
        tie_word_embeddings=True,
        sliding_window=6,
        layer_types=(FULL, SLIDING, FULL),
    ),
    "mistral": ModelConfig(
        **BASE, family=Family.MISTRAL, num_attention_heads=8, num_key_value_heads=2, rope_theta=1e6
    ),
    "mistral_sliding": ModelConfig(
        **BASE,
        family=Family.MISTRAL,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=9,
        layer_types=(SLIDING,) * 3,
    ),
    # Soft caps low enough to bend the scores and logits of so small a model.
    "gemma2": ModelConfig(
        **(BASE | {"num_hidden_layers": 4}),
        family=Family.GEMMA2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
        sliding_window=7,
        layer_types=(SLIDING, FULL, SLIDING, FULL),
        rope_theta=10_000.0,
    ),
    "gemma2_uncapped_untied": ModelConfig(
        **BASE,
        family=Family.GEMMA2,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=9,
        layer_types=(SLIDING, FULL, FULL),
    ),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(
    request: pytest.FixtureRequest, reference_model: Callable[..., Any], stacked_tree: Callable[..., Any]
) -> Any:
    config = CONFIGS[request.param]
    model = reference_model(config)
    return config, model, stacked_tree(dict(model.named_parameters()))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 211, (2, 40))


def test_tree_is_the_described_one(pair: Any) -> None:
    config, _, params = pair
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert shapes == abstract_params(config)


def test_logits(pair: Any, tokens: np.ndarray) -> None:
    config, model, params = pair
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(jax.jit(partial(forward, config))(params, tokens))
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_gradients(pair: Any, tokens: np.ndarray, stacked_tree: Callable[..., Any]) -> None:
    config, model, params = pair
    model.zero_grad()
    model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    expected = stacked_tree({name: parameter.grad for name, parameter in model.named_parameters()})

    def loss(params: Any) -> jax.Array:
        log_probability = jax.nn.log_softmax(forward(config, params, jnp.asarray(tokens))[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probability, jnp.asarray(tokens)[:, 1:, None], axis=-1))

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    for path, reference in traverse_util.flatten_dict(expected, sep="/").items():
        error = np.linalg.norm(gradients[path] - reference) / np.linalg.norm(reference)
        assert error < 1e-3, f"{path}: {error:.1e}"


def test_explicit_positions(pair: Any, tokens: np.ndarray) -> None:
    config, model, params = pair
    positions = np.cumsum(np.random.default_rng(2).integers(1, 4, tokens.shape), axis=1)
    with torch.no_grad():
        expected = model(
            torch.tensor(tokens),
            position_ids=torch.tensor(positions),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
        ).logits.numpy()
    logits = jax.jit(partial(forward, config))(params, tokens, positions=positions)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
