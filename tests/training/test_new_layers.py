"""Stages that train the layers which expansion added, and those alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from babel_jax.config import ExpansionSettings, OptimizerRule, OptimizerSettings, Trained
from babel_jax.errors import BadInput
from babel_jax.expansion.folders import expand_hf_config, new_layers_of
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.model.decoder import abstract_params
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.training.optimizer import AdamW

NEW = (1,)


def stages(*trained):
    return [
        {
            "name": f"part{number}",
            "steps": 4,
            "schedule": {"peak": 1e-2},
            "mixture": {"max_epochs": 1000.0},
            "train": train,
        }
        for number, train in enumerate(trained)
    ]


@pytest.fixture
def train(train_at):
    """Runs a folder to its end with the second of two layers as the new one."""
    return partial(train_at, new_layers=NEW)


def leaves(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep="/")


def test_all_but_the_new_layers_stay_to_the_bit(train, begin, run_config, tmp_path):
    before = leaves(begin(run_config(tmp_path).model.shape))
    for path, leaf in leaves(train(tmp_path, stages=stages("new_layers"))).items():
        if path.startswith("model/layers"):
            np.testing.assert_array_equal(leaf[0], before[path][0], err_msg=path)
            # Biases begin as zeros and have no decay, but every one has a gradient.
            assert (leaf[1] != before[path][1]).any(), path
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_a_rate_of_zero_for_new_layers_keeps_them(train, begin, run_config, tmp_path):
    before = leaves(begin(run_config(tmp_path).model.shape))
    for path, leaf in leaves(
        train(tmp_path, stages=stages("all"), optimizer={"new_layers_rate": 0.0})
    ).items():
        assert (leaf[0] != before[path][0]).any(), path
        if path.startswith("model/layers"):
            np.testing.assert_array_equal(leaf[1], before[path][1], err_msg=path)


# At the boundary in the quick suite, elsewhere in the slow one.
@pytest.mark.parametrize("stop", [4, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (2, 6, 8, 10))])
def test_cut_off_anywhere_it_goes_on_to_the_same_bits(train, tmp_path, cut_off, stop):
    changes = {"stages": stages("new_layers", "all", "new_layers"), "training": {"checkpoint_every": 2}}
    whole = leaves(train(tmp_path / "whole", **changes))
    cut_off(stop, lambda: train(tmp_path / "cut", **changes))
    again = leaves(train(tmp_path / "cut", **changes))
    for path, leaf in whole.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_a_stage_of_new_layers_needs_some(train, tmp_path):
    with pytest.raises(
        BadInput, match=r'stage part0: train = "new_layers", and the model has no new layers; expand it first'
    ):
        train(tmp_path, new_layers=(), stages=stages("new_layers"))


SETTINGS = OptimizerSettings(
    rules=(
        OptimizerRule(pattern="k_proj", freeze=True),
        OptimizerRule(pattern="norm|bias", rate=0.5),
        OptimizerRule(pattern=".", weight_decay=0.1),
    )
)


@pytest.fixture(scope="module")
def trees(tiny_config):
    random = np.random.default_rng(0)
    shapes = abstract_params(tiny_config)
    return shapes, *(
        jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes)
        for _ in range(4)
    )


def test_the_update_is_that_of_optax(trees):
    shapes, params, *gradients = trees
    ours = AdamW(SETTINGS, shapes)
    labels = jax.tree.map(
        lambda rule: rule.pattern, ours.rules, is_leaf=lambda rule: isinstance(rule, OptimizerRule)
    )
    theirs = optax.multi_transform(
        {
            rule.pattern: optax.set_to_zero()
            if rule.freeze
            else optax.adamw(
                1e-3 * rule.rate, SETTINGS.b1, SETTINGS.b2, SETTINGS.eps, weight_decay=rule.weight_decay
            )
            for rule in SETTINGS.rules
        },
        labels,
    )
    found, expected, state, reference = params, params, ours.init(params), theirs.init(params)
    for gradient in gradients:
        found, state = ours.update(gradient, state, found, jnp.float32(1e-3))
        updates, reference = theirs.update(gradient, reference, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7), found, expected
    )


def test_rows_are_updated_as_in_the_whole_and_the_others_have_no_moments(trees):
    shapes, params, *gradients = trees
    new_layers = (1, 3)
    whole, rows = AdamW(SETTINGS, shapes), AdamW(SETTINGS, shapes, Trained.NEW_LAYERS, new_layers)
    state, row_state = whole.init(params), rows.init(params)
    found, expected = params, params
    for gradient in gradients:
        expected, state = whole.update(gradient, state, expected, jnp.float32(1e-3))
        found, row_state = rows.update(gradient, row_state, found, jnp.float32(1e-3))
    trained = [path for path in leaves(params) if path.startswith("model/layers") and "k_proj" not in path]
    assert len(jax.tree.leaves(row_state)) == 2 * len(trained) + 1
    assert {leaf.shape[0] for leaf in jax.tree.leaves(row_state) if leaf.ndim} == {2}
    before, found, expected = leaves(params), leaves(found), leaves(expected)
    for path, leaf in found.items():
        for layer in range(4) if path.startswith("model/layers") else [...]:
            same = expected if layer in new_layers and path in trained else before
            np.testing.assert_array_equal(leaf[layer], same[path][layer], err_msg=f"{path} {layer}")
    squares = sum(
        np.sum(np.square(leaves(gradients[0])[path][list(new_layers)], dtype=np.float64)) for path in trained
    )
    assert rows.norm(gradients[0]) == pytest.approx(np.sqrt(squares), rel=1e-5)


def test_moments_are_carried_over(trees):
    shapes, params, *gradients = trees
    whole, rows = AdamW(SETTINGS, shapes), AdamW(SETTINGS, shapes, Trained.NEW_LAYERS, (1, 3))
    _, row_state = rows.update(gradients[0], rows.init(params), params, jnp.float32(1e-3))
    state = whole.carried_over(row_state, rows, params)
    assert jax.tree.structure(state) == jax.tree.structure(whole.init(params))
    assert int(state.inner_state.count) == 1
    up = state.inner_state.mu["model"]["layers"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(
        up[np.array([1, 3])], row_state.inner_state.mu["model"]["layers"]["mlp"]["up_proj"]["weight"]
    )
    assert not np.asarray(up)[[0, 2]].any()
    assert not np.asarray(state.inner_state.mu["model"]["embed_tokens"]["weight"]).any()
    back = rows.carried_over(state, whole, params)
    jax.tree.map(np.testing.assert_array_equal, back, row_state)


def test_what_is_new_is_read_from_config_json(tiny_config):
    hf = write_hf_config(tiny_config)
    assert new_layers_of(hf) == ()
    plan = plan_from_settings(ExpansionSettings(insert_after=(1, 3)), 4)
    deeper = expand_hf_config(hf, plan, "tiny")
    assert new_layers_of(deeper) == plan.new_layers == (2, 5)
    with pytest.raises(BadInput, match="a plan of 6 layers in a model of 7"):
        new_layers_of({**deeper, "num_hidden_layers": 7})
    with pytest.raises(BadInput, match="babel_expansion"):
        new_layers_of({**deeper, "babel_expansion": "mine"})
