"""A run that is deepened midway goes on with its step, its data and its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from babel_jax.errors import BadInput
from babel_jax.recipe.claim import claim
from babel_jax.training.deepening import depth_at, depths, expand_state
from babel_jax.training.optimizer import AdamW
from babel_jax.training.run import train_stages
from babel_jax.training.run_state import read_json_lines


def deepen(step, moments="copy", **expansion):
    where = {} if expansion.keys() & {"insert_after", "append", "preset"} else {"insert_after": [1]}
    return {"step": step, "moments": moments, "expansion": {**where, **expansion}}


@pytest.fixture
def train(run_config, begin):
    def go(folder, **changes):
        folder.mkdir(exist_ok=True)
        config = run_config(folder, **changes)
        shape = config.model.shape
        ended = []
        params = train_stages(
            config,
            depths(shape, (), config.deepen),
            lambda: begin(shape),
            folder,
            lambda stage, model, _: ended.append((stage.name, model.num_hidden_layers)),
        )
        return (
            jax.device_get(params),
            ended,
            [line["loss"] for line in read_json_lines(folder / "metrics.jsonl")],
        )

    return go


def test_step_and_data_stay_and_layers_of_zeros_change_no_loss(train, tmp_path):
    _, _, plain = train(tmp_path / "plain")
    params, ended, deeper = train(
        tmp_path / "deeper", deepen=[deepen(4, insert_after=[0, 1], init="zero"), deepen(6, append=1)]
    )
    assert ended == [("first", 4), ("second", 5)]
    assert params["model"]["layers"]["mlp"]["up_proj"]["weight"].shape[0] == 5
    assert len(deeper) == len(plain) == 10
    # The step before which new layers of zeros came sees the same batch and gives the same loss; then they
    # are trained.
    np.testing.assert_allclose(deeper[:5], plain[:5], rtol=1e-6)
    assert deeper[5:] != pytest.approx(plain[5:], rel=1e-6)


@pytest.mark.slow
def test_offloaded_moments_are_expanded_too(train, tmp_path):
    changes = {"deepen": [deepen(4, init="noise")]}
    whole, _, losses = train(tmp_path / "whole", **changes)
    again, _, same = train(tmp_path / "offloaded", **changes, training={"offload_optimizer_state": True})
    assert same == losses
    jax.tree.map(np.testing.assert_array_equal, again, whole)


# At the boundary in the quick suite, elsewhere in the slow one.
@pytest.mark.parametrize("stop", [4, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (3, 5, 7))])
def test_cut_off_anywhere_it_goes_on_to_the_same_bits(train, tmp_path, cut_off, stop):
    changes = {"deepen": [deepen(4, init="noise"), deepen(6, "zero")], "training": {"checkpoint_every": 2}}
    whole, _, losses = train(tmp_path / "whole", **changes)
    cut_off(stop, lambda: train(tmp_path / "cut", **changes))
    again, _, same = train(tmp_path / "cut", **changes)
    assert same == losses
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_stage_of_new_layers_trains_those_of_the_last_deepening(train, tmp_path):
    schedule, mixture = {"peak": 1e-2}, {"max_epochs": 1000.0}
    stages = [
        {"name": "first", "steps": 3, "schedule": schedule, "mixture": mixture},
        {"name": "second", "steps": 3, "schedule": schedule, "mixture": mixture, "train": "new_layers"},
    ]
    changes = {"stages": stages, "deepen": [deepen(3, insert_after=[0])]}
    params, _, _ = train(tmp_path / "whole", **changes)
    # The checkpoint at the end of the first stage is that of the model before.
    before, _, _ = train(tmp_path / "before", stages=stages[:1])
    for path, leaf in traverse_util.flatten_dict(before).items():
        after = traverse_util.flatten_dict(params)[path]
        if path[:2] == ("model", "layers"):
            np.testing.assert_array_equal(after[[0, 2]], leaf)
            assert (after[1] != leaf[0]).any()
        else:
            np.testing.assert_array_equal(after, leaf)


@pytest.mark.parametrize("moments", ["copy", "zero"])
def test_moments_of_new_layers_are_those_of_their_source_or_zero(run_config, begin, tmp_path, moments):
    config = run_config(tmp_path, deepen=[deepen(4, moments, append=2, init="zero")])
    before, deeper = depths(config.model.shape, (), config.deepen)
    params = begin(before.config)
    optimizer = AdamW(config.optimizer, params)
    gradients = jax.tree.map(lambda leaf: leaf + 1.0, params)
    _, state = optimizer.update(gradients, optimizer.init(params), params, jnp.float32(1e-3))
    expanded, new = expand_state(params, state, deeper)
    assert int(new.inner_state.count) == 1
    assert jax.tree.map(np.shape, new.inner_state.mu) == jax.tree.map(np.shape, expanded)
    for old, now in ((state.inner_state.mu, new.inner_state.mu), (state.inner_state.nu, new.inner_state.nu)):
        for path, leaf in traverse_util.flatten_dict(old).items():
            after = np.asarray(traverse_util.flatten_dict(now)[path])
            if path[:2] != ("model", "layers"):
                np.testing.assert_array_equal(after, leaf)
                continue
            np.testing.assert_array_equal(after[:2], leaf)
            np.testing.assert_array_equal(after[2:], leaf if moments == "copy" else np.zeros_like(leaf))


def test_which_model_takes_which_step(run_config, tmp_path):
    config = run_config(tmp_path, deepen=[deepen(4), deepen(6, append=2)])
    models = depths(config.model.shape, (1,), config.deepen)
    assert [depth_at(models, step).config.num_hidden_layers for step in (-1, 0, 3, 4, 5, 6, 99)] == [
        2,
        2,
        2,
        3,
        3,
        5,
        5,
    ]
    assert [model.new_layers for model in models] == [(1,), (2,), (3, 4)]


@pytest.mark.parametrize(
    ("deepenings", "says"),
    [
        ([deepen(10)], r"deepen: step 10 is not before the end; the run has 10 steps"),
        (
            [deepen(4, insert_after=[2])],
            r"deepen.0: insert_after names layers \[2\], and the model has layers 0 to 1",
        ),
        (
            [deepen(4), deepen(5, preset="babel-9b")],
            r"deepen.1: preset babel-9b is for a model of 28 layers; this one has 3",
        ),
        ([deepen(5), deepen(5)], r"deepen: the steps must ascend; given 5, 5"),
        ([deepen(0)], r"deepen.0.step"),
    ],
)
def test_what_cannot_be_is_said(train, tmp_path, deepenings, says):
    with pytest.raises(BadInput, match=says):
        train(tmp_path, deepen=deepenings)


def test_a_run_may_be_deepened_as_long_as_it_has_not_come_to_the_step(run_config, tmp_path):
    first, later, other = (
        run_config(tmp_path, deepen=[deepen(4, append=1), *more]) for more in ([], [deepen(6)], [deepen(7)])
    )
    claim(tmp_path, first)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    claim(tmp_path, later)
    claim(tmp_path, other)
    (tmp_path / "checkpoints" / "8").mkdir()
    claim(tmp_path, other)
    for changed in (first, later):
        with pytest.raises(BadInput, match="begun with another deepen"):
            claim(tmp_path, changed)
    with pytest.raises(BadInput, match="begun with another"):
        claim(tmp_path, other.model_copy(update={"seed": 1}))
