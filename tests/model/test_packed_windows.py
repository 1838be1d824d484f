"""Several documents in one window: each must come out as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babel_jax.config import Family, LayerType, Remat
from babel_jax.model.attention import masks
from babel_jax.model.execution import Execution
from tests.compiled import forward, init_params

TIME = 32
run = jax.jit(forward, static_argnames="config")


@pytest.fixture(scope="module", params=["full", "sliding", "gemma2"])
def model(request, tiny_config):
    changes = {
        "full": {},
        "sliding": {"sliding_window": 4, "layer_types": (LayerType.FULL, LayerType.SLIDING) * 2},
        "gemma2": {
            "family": Family.GEMMA2,
            "attn_logit_softcapping": 4.0,
            "qkv_bias": False,
            "post_norms": True,
        },
    }
    config = tiny_config.model_copy(update=changes[request.param])
    return config, jax.tree.map(lambda leaf: leaf * 3, init_params(config, jax.random.key(0)))


def test_documents_of_a_window_do_not_see_each_other(model):
    config, params = model
    lengths = (11, 1, 7, 9)
    tokens = np.random.default_rng(0).integers(0, 512, (1, TIME))
    segment_ids = np.repeat([1, 2, 3, 4, 0], [*lengths, TIME - sum(lengths)])[None]
    packed = np.asarray(run(config, params, tokens, segment_ids=segment_ids))
    start = 0
    for length in lengths:
        alone = np.zeros((1, TIME), np.int64)
        alone[0, :length] = tokens[0, start : start + length]
        expected = np.asarray(run(config, params, alone))[0, :length]
        np.testing.assert_allclose(packed[0, start : start + length], expected, atol=2e-5, rtol=0)
        start += length
    assert np.isfinite(packed).all()


def test_padding_and_other_documents_change_no_bit(model):
    config, params = model
    random = np.random.default_rng(1)
    tokens = random.integers(0, 512, (1, TIME))
    segment_ids = np.repeat([1, 2, 0], [10, 12, 10])[None]
    other = np.where(segment_ids == 2, tokens, random.integers(0, 512, tokens.shape))
    one, two = (
        np.asarray(run(config, params, each, segment_ids=segment_ids))[segment_ids == 2]
        for each in (tokens, other)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("remat", Remat)
def test_rematerialization_changes_no_gradient(tiny_config, tiny_params, remat):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 512, (2, 16)))

    def loss(params, remat):
        return jnp.mean(jnp.square(forward(tiny_config, params, tokens, execution=Execution(remat=remat))))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for found, expected in zip(
        jax.tree.leaves(gradient(tiny_params, remat)),
        jax.tree.leaves(gradient(tiny_params, Remat.NONE)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("remat", "constraints"), [(Remat.FULL, 0), (Remat.GATE, 1), (Remat.MLP, 2)])
def test_the_layout_of_kept_values_changes_no_bit(tiny_config, tiny_params, remat, constraints):
    """On v6e the kept values of the MLP are laid out for the backward pass; other values are left alone."""
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 512, (2, 16)))

    def loss(params, tokens_minor):
        execution = Execution(remat=remat, tokens_minor=tokens_minor)
        return jnp.mean(jnp.square(forward(tiny_config, params, tokens, execution=execution)))

    trace = str(jax.make_jaxpr(loss, static_argnums=1)(tiny_params, True))
    assert trace.count("layout_constraint[") == constraints
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(np.testing.assert_array_equal, gradient(tiny_params, True), gradient(tiny_params, False))


@settings(max_examples=50)
@given(data=st.data(), window=st.none() | st.integers(1, 40))
def test_the_mask_by_its_definition(data, window):
    segment_ids = np.array(data.draw(st.lists(st.integers(0, 3), min_size=24, max_size=24)))
    found = np.asarray(masks(jnp.asarray(segment_ids[None]), len(segment_ids), (window,)))[0, 0]
    for time in range(len(segment_ids)):
        for source in range(len(segment_ids)):
            near = window is None or time - source < window
            assert found[time, source] == (
                source <= time and segment_ids[time] == segment_ids[source] and near
            )
