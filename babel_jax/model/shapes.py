"""The parameter tree of a model by its config, without JAX: the place and shape of every leaf.

The decoder's modules declare the same parameters with logical axes and initializers, and a test compares the
two. Conversion and expansion need the shapes alone, and JAX and Flax take two seconds to import.
"""

from collections.abc import Iterator

from babel_jax.config import ModelConfig

Place = tuple[str, ...]
Shape = tuple[int, ...]

LAYERS: Place = ("model", "layers")
# The tables with a row for each token: the input embedding, and the head if it is not tied to it.
EMBEDDING: Place = ("model", "embed_tokens", "weight")
HEAD: Place = ("lm_head", "weight")
TABLES: tuple[Place, ...] = (EMBEDDING, HEAD)


def is_table(place: Place) -> bool:
    """Whether the leaf at `place` has a row for each token."""
    return place in TABLES


def is_stacked(place: Place) -> bool:
    """Whether the leaf at `place` has the layer as its first axis."""
    return place[: len(LAYERS)] == LAYERS


def leaf_shapes(config: ModelConfig) -> dict[Place, Shape]:
    """The shape of every leaf of the parameter tree, in the order of their places; leaves under the layers
    are stacked.
    """
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size), ("model", "norm", "weight"): _norm(config)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    for place, shape in _layer_shapes(config):
        shapes[*LAYERS, *place] = (config.num_hidden_layers, *shape)
    return dict(sorted(shapes.items()))


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[Place, Shape]]:
    """The place within a layer and the shape of each parameter of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    # For each linear map: its output and input features, and if it has a bias.
    linear = {
        ("self_attn", "q_proj"): (query_size, hidden, config.qkv_bias),
        ("self_attn", "k_proj"): (key_size, hidden, config.qkv_bias),
        ("self_attn", "v_proj"): (key_size, hidden, config.qkv_bias),
        ("self_attn", "o_proj"): (hidden, query_size, config.o_bias),
        ("mlp", "gate_proj"): (inner, hidden, config.mlp_bias),
        ("mlp", "up_proj"): (inner, hidden, config.mlp_bias),
        ("mlp", "down_proj"): (hidden, inner, config.mlp_bias),
    }
    for place, (outputs, inputs, has_bias) in linear.items():
        yield (*place, "weight"), (outputs, inputs)
        if has_bias:
            yield (*place, "bias"), (outputs,)

    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in norms:
        yield (name, "weight"), _norm(config)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield ("self_attn", name, "weight"), (config.head_dim,)


def _norm(config: ModelConfig) -> Shape:
    return (config.hidden_size,)
