"""One description per parameter: counts, names, shapes, initial values, and a program that does not grow with
depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.config import ModelConfig
from babel_jax.model.attention import positions_of
from babel_jax.model.decoder import abstract_params, count_parameters, describe, forward, init_params


@pytest.mark.parametrize(
    ("layers", "hidden", "mlp", "heads", "kv_heads", "published"),
    [(34, 3584, 18944, 28, 4, 9_013_963_264), (92, 8192, 29568, 64, 8, 83_238_420_480)],
)
def test_counts_are_the_published_ones(layers, hidden, mlp, heads, kv_heads, published):
    config = ModelConfig(
        vocab_size=152064,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    assert count_parameters(config) == published


def test_every_parameter_has_a_name_for_each_axis(tiny_config):
    for path, parameter in flatten_dict(describe(tiny_config), sep="/").items():
        assert len(parameter.logical_axes) == len(parameter.shape), path
        assert (parameter.logical_axes[0] == "layers") == ("/layers/" in path)
    assert flatten_dict(describe(tiny_config), sep="/")["model/layers/mlp/down_proj/weight"].logical_axes == (
        "layers",
        "embed",
        "mlp",
    )


def test_initial_values_follow_the_key_and_the_path_alone(tiny_config, tiny_params):
    tied_config = tiny_config.model_copy(update={"tie_word_embeddings": True})
    tied = flatten_dict(jax.jit(init_params, static_argnums=0)(tied_config, jax.random.key(0)), sep="/")
    ours = flatten_dict(tiny_params, sep="/")
    assert set(ours) - set(tied) == {"lm_head/weight"}
    for path, leaf in tied.items():
        np.testing.assert_array_equal(leaf, ours[path])
    assert np.std(ours["model/layers/mlp/up_proj/weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.all(np.asarray(ours["model/layers/input_layernorm/weight"]) == 1.0)
    assert not np.any(ours["model/layers/self_attn/q_proj/bias"])


def test_the_program_does_not_grow_with_depth(tiny_config):
    def equations(layers):
        config = tiny_config.model_copy(update={"num_hidden_layers": layers})
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        return str(
            jax.make_jaxpr(lambda params, tokens: forward(config, params, tokens))(
                abstract_params(config), tokens
            )
        ).count("\n")

    assert equations(4) == equations(92)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_positions_count_from_the_start_of_each_segment(lengths):
    # Rows of one length, or each example would compile.
    padding = 36 - sum(lengths)
    segment_ids = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    expected = np.concatenate([*(np.arange(length) for length in lengths), np.zeros(padding, int)])
    np.testing.assert_array_equal(positions_of(jnp.array(segment_ids[None]))[0], expected)
