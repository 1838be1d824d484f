"""Sensitivities against models whose layers are really taken out or put in twice, by `transformers` and by
hand.
"""

import jax
import numpy as np
import pytest

from babel_jax.config import ExpansionSettings, Family, LayerType, ModelConfig
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.folders import expand_config
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.studies.packed_text import encode
from babel_jax.studies.sensitivity import (
    LayerEffect,
    layers_to_double,
    plot_sensitivity,
    sensitivity,
    sensitivity_table,
)
from babel_jax.training.mesh import make_mesh
from tests.compiled import init_params
from tests.studies.test_packed_text import Bytes, bits_of

TEXTS = {"en": ["a short one", "another text, a bit longer, in two pieces"], "sw": ["habari ya asubuhi"]}


@pytest.fixture(scope="module", params=[Family.QWEN2, Family.GEMMA2], ids=str)
def model(request):
    config = ModelConfig(
        family=request.param, vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256, sliding_window=5, layer_types=(LayerType.SLIDING, LayerType.FULL,
        LayerType.SLIDING),
    )  # fmt: skip
    params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
    texts = encode(Bytes(), TEXTS, seq_len=48, batch_size=2)
    return config, params, texts, sensitivity(config, params, texts, make_mesh({}))


def bits_per_byte(config, params, texts):
    """By the plain forward pass."""
    return {language: bits_of(config, params, text) / text.bytes for language, text in texts.items()}


def without_layer(params, removed):
    kept = np.array([layer for layer in range(3) if layer != removed])
    layers = jax.tree.map(lambda leaf: leaf[kept], params["model"]["layers"])
    return {**params, "model": {**params["model"], "layers": layers}}, kept


def test_the_model_itself(model):
    config, params, texts, found = model
    assert found.model == pytest.approx(bits_per_byte(config, params, texts), rel=1e-5)


@pytest.mark.parametrize("layer", range(3))
def test_removed_and_doubled_layers_give_the_loss_of_such_models(model, layer):
    config, params, texts, found = model
    shallow, kept = without_layer(params, layer)
    assert found.removed[layer] == pytest.approx(
        bits_per_byte(config.with_layers(tuple(kept)), shallow, texts), rel=1e-5
    )
    plan = plan_from_settings(ExpansionSettings(insert_after=(layer,)), 3)
    deeper = bits_per_byte(expand_config(config, plan), expand_params(params, plan), texts)
    assert found.doubled[layer] == pytest.approx(deeper, rel=1e-5)
    assert found.removed[layer] != pytest.approx(found.model, rel=1e-3)


def test_cosines_against_transformers(reference_model, stacked_tree):
    torch = pytest.importorskip("torch")
    config = ModelConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    reference = reference_model(config)
    texts = {"en": ["one text alone"]}
    params, encoded = (
        stacked_tree(dict(reference.named_parameters())),
        encode(Bytes(), texts, seq_len=16, batch_size=2),
    )
    found = sensitivity(config, params, encoded, make_mesh({}))
    streams = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: streams.append((inputs[0], output)))
        for layer in reference.model.layers
    ]
    with torch.no_grad():
        reference(torch.tensor([list(texts["en"][0].encode())]))
    for hook in hooks:
        hook.remove()
    for layer, (before, behind) in enumerate(streams):
        behind = behind[0] if isinstance(behind, tuple) else behind
        expected = torch.nn.functional.cosine_similarity(before, behind, dim=-1).mean().item()
        assert found.cosine[layer]["en"] == pytest.approx(expected, abs=1e-5)


def test_known_layers_are_not_computed_again(model):
    config, params, texts, found = model
    told = LayerEffect({"en": 0.5, "sw": 0.5}, {"en": 9.0, "sw": 9.0}, {"en": 8.0, "sw": 8.0})
    computed = {}
    again = sensitivity(
        config, params, texts, make_mesh({}), known={1: told}, found=lambda *pair: computed.update([pair])
    )
    assert list(computed) == [0, 2]
    assert (again.cosine[1], again.removed[1], again.doubled[1]) == told
    # The layers above a known one see what it gives.
    assert again.doubled[2] == pytest.approx(found.doubled[2], rel=1e-6)
    assert again.model == pytest.approx(found.model, rel=1e-6)


def test_layers_to_double_are_those_that_cost_least(model):
    *_, found = model
    costs = [np.mean(list(by_language.values())) for by_language in found.doubled]
    assert layers_to_double(found, 1) == (int(np.argmin(costs)),)
    assert layers_to_double(found, 3) == (0, 1, 2)
    with pytest.raises(ValueError, match="4 layers of 3"):
        layers_to_double(found, 4)


def test_table_and_plot(model, tmp_path):
    *_, found = model
    table = sensitivity_table(found).splitlines()
    assert len(table) == 2 + 3
    change = 100 * (np.mean(list(found.removed[1].values())) / np.mean(list(found.model.values())) - 1)
    assert f"{change:+.1f}%" in table[3]
    plot_sensitivity(tmp_path / "plot.png", found)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
