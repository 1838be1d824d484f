"""The shapes that conversion uses, beside the parameters that the decoder's modules declare."""

from itertools import product

import pytest
from flax import traverse_util

from babel_jax.config import ModelConfig
from babel_jax.model.decoder import describe
from babel_jax.model.shapes import leaf_shapes

# Every optional parameter. Each is independent of the others.
OPTIONS = ("tie_word_embeddings", "qkv_bias", "qk_norm", "o_bias", "mlp_bias", "post_norms")


@pytest.mark.parametrize("given", product((False, True), repeat=2))
@pytest.mark.parametrize("pair", zip(OPTIONS[::2], OPTIONS[1::2], strict=True))
def test_shapes_are_those_of_the_modules(pair, given):
    config = ModelConfig(
        vocab_size=7,
        hidden_size=20,
        intermediate_size=11,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        **dict(zip(pair, given, strict=True)),
    )
    declared = traverse_util.flatten_dict(describe(config))
    shapes = leaf_shapes(config)
    assert shapes == {place: parameter.shape for place, parameter in declared.items()}
    # The order is that of written files.
    assert list(shapes) == sorted(shapes)
