import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.commands import models
from babel_jax.config import ExpansionSettings, Init, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.expansion.folders import expand_config
from babel_jax.expansion.plan import (
    PRESETS,
    ExpansionPlan,
    load_plan,
    plan_from_json,
    plan_from_settings,
    save_plan,
    spread_layers,
)
from babel_jax.model.decoder import count_parameters

QWEN_7B = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
QWEN_72B = ModelConfig(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("preset", "source", "layers", "parameters"),
    [("babel-9b", QWEN_7B, 34, 9_013_963_264), ("babel-83b", QWEN_72B, 92, 83_238_420_480)],
)
def test_presets_are_those_of_the_report(preset, source, layers, parameters):
    plan = plan_from_settings(ExpansionSettings(preset=preset), source.num_hidden_layers)
    deeper = expand_config(source, plan)
    assert (deeper.num_hidden_layers, count_parameters(deeper)) == (layers, parameters)
    assert all(plan.source_layers[new] == plan.source_layers[new - 1] for new in plan.new_layers)
    assert [plan.source_layers[new] for new in plan.new_layers] == list(PRESETS[preset][1])
    with pytest.raises(
        BadInput, match=rf"{preset} is for a model of {source.num_hidden_layers} layers; this one has 27"
    ):
        plan_from_settings(ExpansionSettings(preset=preset), 27)


def test_the_9b_preset_layer_by_layer():
    plan = plan_from_settings(ExpansionSettings(preset="babel-9b"), 28)
    assert plan.source_layers == (
        *range(15),
        14,
        15,
        16,
        16,
        17,
        18,
        18,
        19,
        20,
        20,
        21,
        22,
        22,
        23,
        24,
        24,
        25,
        26,
        27,
    )
    assert plan.new_layers == (15, 18, 21, 24, 27, 30)


def test_append_repeats_the_last_layers_in_order():
    plan = plan_from_settings(ExpansionSettings(append=2, init=Init.ZERO), 4)
    assert plan.source_layers == (0, 1, 2, 3, 2, 3)
    assert plan.new_layers == (4, 5)
    assert [layer.init for layer in plan.layers] == [Init.COPY] * 4 + [Init.ZERO] * 2


settings_and_depth = st.integers(1, 20).flatmap(
    lambda depth: st.tuples(
        st.builds(
            lambda position, init, seed, mean, std: ExpansionSettings(
                **position, init=init, seed=seed, noise_mean=mean, noise_std=std
            ),
            st.one_of(
                st.builds(
                    lambda after: {"insert_after": tuple(after)},
                    st.lists(st.integers(0, depth - 1), min_size=1, max_size=8, unique=True),
                ),
                st.builds(lambda append: {"append": append}, st.integers(1, depth)),
            ),
            st.sampled_from(Init),
            st.integers(0, 2**32 - 1),
            st.floats(-1, 1),
            st.floats(0, 1),
        ),
        st.just(depth),
    )
)


@given(settings_and_depth)
def test_plans_keep_the_model_and_add_what_was_asked(drawn):
    settings, depth = drawn
    plan = plan_from_settings(settings, depth)
    asked = (
        sorted(settings.insert_after)
        if settings.insert_after
        else list(range(depth - settings.append, depth))
    )
    assert [plan.source_layers[new] for new in plan.new_layers] == asked
    assert [
        source for target, source in enumerate(plan.source_layers) if target not in plan.new_layers
    ] == list(range(depth))
    assert plan.depth == depth
    if settings.insert_after:
        assert list(plan.source_layers) == sorted(plan.source_layers)
    for target, layer in enumerate(plan.layers):
        written_as_copy = settings.init in (Init.IDENTITY, Init.SCALED)
        assert layer.init is (
            settings.init if target in plan.new_layers and not written_as_copy else Init.COPY
        )
        if layer.init is Init.NOISE:
            assert (layer.noise_mean, layer.noise_std, layer.seed) == (
                settings.noise_mean,
                settings.noise_std,
                settings.seed,
            )


@given(settings_and_depth)
def test_output_scales(drawn):
    settings, depth = drawn
    plan = plan_from_settings(settings, depth)
    shared = dict.fromkeys(range(depth), 0.0)
    for target, layer in enumerate(plan.layers):
        shared[layer.source] += layer.output_scale
        if settings.init is Init.IDENTITY:
            assert layer.output_scale == (0.0 if target in plan.new_layers else 1.0)
    if settings.init in (Init.IDENTITY, Init.SCALED):
        assert all(abs(total - 1.0) < 1e-12 for total in shared.values())
    else:
        assert {layer.output_scale for layer in plan.layers} == {1.0}


@given(settings_and_depth)
def test_a_plan_is_the_same_after_json(drawn):
    plan = plan_from_settings(*drawn)
    assert plan_from_json(json.loads(json.dumps(plan.model_dump())), "plan") == plan


def test_a_saved_plan_is_edited_and_applied(tmp_path):
    plan = plan_from_settings(
        ExpansionSettings(insert_after=(1,), init=Init.NOISE, noise_mean=1e-4, noise_std=1e-3, seed=5), 2
    )
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    assert text.count("\n") == 5
    (tmp_path / "plan.json").write_text(text.replace('"noise_std": 0.001', '"noise_std": 0.5'))
    edited = plan_from_settings(ExpansionSettings(plan=str(tmp_path / "plan.json")), 2)
    assert edited.layers[2].noise_std == 0.5
    with pytest.raises(BadInput, match=r"plan.json: keeps 2 layers, and the model has 3"):
        plan_from_settings(ExpansionSettings(plan=str(tmp_path / "plan.json")), 3)
    with pytest.raises(
        BadInput, match=r"plan.json: names source layers \[1\], and the model has layers 0 to 0"
    ):
        plan_from_settings(ExpansionSettings(plan=str(tmp_path / "plan.json")), 1)


def copies(*sources):
    return {"layers": [{"source": source} for source in sources]}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], ["JSON object", "layers"]),
        ({}, ["layers", "missing"]),
        ({"layers": []}, ["layers"]),
        ({"layers": [{}]}, ["layers.0.source", "missing"]),
        ({"layers": [{"source": -1}]}, ["layers.0.source", "-1"]),
        ({"layers": [{"source": 0.5}]}, ["layers.0.source", "0.5"]),
        ({"layers": [{"source": 0, "init": "random"}]}, ["layers.0.init", "'copy', 'noise', 'zero'"]),
        (
            {"layers": [{"source": 0}, {"source": 0, "init": "scaled"}]},
            ["layers.1", "init = copy with an output_scale of 0 or 0.5"],
        ),
        (
            {"layers": [{"source": 0}, {"source": 0, "init": "noise", "noise_std": -1.0}]},
            ["layers.1.noise_std", "-1.0"],
        ),
        (
            {"layers": [{"source": 0}, {"source": 0, "init": "noise", "noise_mean": -1e39}]},
            ["layers.1.noise_mean", "-1e+39"],
        ),
        (
            {"layers": [{"source": 0}, {"source": 0, "output_scale": 1e39}]},
            ["layers.1.output_scale", "1e+39"],
        ),
        ({"layers": [{"source": 0}, {"source": 0, "init": "noise", "seed": 2**32}]}, ["layers.1.seed"]),
        (
            {"layers": [{"source": 0}, {"source": 0, "init": "zero", "noise_std": 1.0}]},
            ["layers.1", "init = zero"],
        ),
        ({"layers": [{"source": 0, "sauce": 1}]}, ["sauce", "did you mean source?"]),
        ({"layers": [{"source": 0, "init": "zero"}]}, ["source layers [0]", "init = copy"]),
        (copies(0, 2), ["[0, 2]", "in order"]),
        (copies(1, 0), ["[1, 0]", "in order"]),
        ({"layers": [{"source": 0}, {"source": 1, "init": "zero"}]}, ["[1]", "no entry with init = copy"]),
    ],
)
def test_what_is_wrong_in_a_plan_file_is_named(tmp_path, values, words):
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(BadInput) as raised:
        load_plan(tmp_path / "plan.json")
    message = str(raised.value)
    assert message.startswith(str(tmp_path / "plan.json"))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_plan_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="no such plan file"):
        load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(BadInput, match="not a readable JSON file"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # Without a bound on its length, so its check must not take the square of it.
        ({"insert_after": (0,) * 1_000_000}, r"insert_after names layers \[0\] more than once"),
        (
            {"insert_after": (1, 2, 1)},
            r"insert_after names layers \[1\] more than once; for several copies of a layer give a plan file",
        ),
        ({"insert_after": (1, 4)}, r"insert_after names layers \[4\], and the model has layers 0 to 3"),
        ({"append": 5}, "append = 5: the model has 4 layers"),
        ({"preset": "babel-9c"}, "'babel-9c' is not known; known presets: babel-9b, babel-83b"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, words):
    with pytest.raises(BadInput, match=words):
        plan_from_settings(ExpansionSettings(**settings), 4)


def test_a_plan_is_hashable():
    assert hash(plan_from_settings(ExpansionSettings(append=1), 2)) == hash(
        ExpansionPlan.model_validate_json(json.dumps(copies(0, 1, 1)))
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_ablations_place_new_layers_as_the_presets(preset):
    depth, after = PRESETS[preset]
    assert spread_layers(len(after), depth) == after


@given(st.integers(1, 100).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_ablations_place_every_number_of_layers(drawn):
    depth, count = drawn
    layers = spread_layers(count, depth)
    assert len(layers) == count == len(set(layers))
    assert sorted(layers) == list(layers)
    assert 0 <= min(layers) <= max(layers) < depth


def test_the_command_line_offers_every_init():
    assert list(models._INITS) == list(Init)
