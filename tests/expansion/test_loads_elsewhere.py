"""Deeper folders of every family and init, loaded and run by transformers."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.config import ExpansionSettings, Family, Init, LayerType, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.expansion.folders import expand_folder
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.model.decoder import forward
from babel_jax.model_folders import transformers_check
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.transfer import convert

TOKENS = np.arange(24, dtype=np.int32)[None] * 7 % 48
FULL, SLIDING = LayerType.FULL, LayerType.SLIDING
WINDOWS = {
    Family.QWEN2: (FULL, FULL, SLIDING),
    Family.QWEN3: (FULL, SLIDING, SLIDING),
    Family.LLAMA: (),
    Family.MISTRAL: (SLIDING,) * 3,
    Family.GEMMA2: (SLIDING, FULL, SLIDING),
}
# Keys that files of transformers 4 do not have.
NEW_KEYS = ("layer_types", "rope_parameters", "dtype", "head_dim")


def config_of(family, types=None):
    types = WINDOWS[family] if types is None else types
    return ModelConfig(
        family=family,
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        layer_types=types,
        sliding_window=4 if SLIDING in types else None,
    )


def edit(folder, **changes):
    """Changes config.json; None removes a key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def theirs(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS, dtype=torch.long)).logits.numpy()


def ours(folder):
    opened = open_folder(folder)
    return np.asarray(forward(opened.config, load_params(opened), jnp.asarray(TOKENS)))


def assert_same_logits(folder):
    expected = theirs(folder)
    assert expected.std() > 0.01
    np.testing.assert_allclose(ours(folder), expected, atol=2e-5)


@pytest.mark.parametrize("init", Init)
@pytest.mark.parametrize("family", Family)
def test_a_deeper_model_of_either_dialect_loads_with_the_same_logits(
    tmp_path, write_small_model, family, init
):
    noise = {"noise_mean": 0.01, "noise_std": 0.01} if init is Init.NOISE else {}
    if family is Family.GEMMA2 and init is Init.SCALED:
        pytest.skip("norms behind attention and MLP undo the scale, so it is refused")
    plan = plan_from_settings(ExpansionSettings(insert_after=(1, 2), init=init, **noise), 3)
    for dialect, removed in (("old", dict.fromkeys(NEW_KEYS)), ("new", {})):
        source = write_small_model(tmp_path / dialect, config_of(family))
        if family in (Family.QWEN3, Family.GEMMA2):
            removed = {key: None for key in removed if key != "head_dim"}
        edit(source, **removed)
        expand_folder(source, tmp_path / f"{dialect}-deeper", plan)
    assert_same_logits(tmp_path / "old-deeper")
    np.testing.assert_array_equal(ours(tmp_path / "new-deeper"), ours(tmp_path / "old-deeper"))
    if family is Family.MISTRAL:
        assert "layer_types" not in json.loads((tmp_path / "old-deeper" / "config.json").read_text())


@pytest.mark.parametrize(
    "spelling", [{}, {"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}]
)
def test_mistral_with_layer_types_is_ministral(tmp_path, write_small_model, spelling):
    source = write_small_model(tmp_path / "source", config_of(Family.MISTRAL, (FULL, SLIDING, SLIDING)))
    edit(source, **spelling)
    assert open_folder(source).config.windows == (None, 4, 4)
    assert_same_logits(source)
    plan = plan_from_settings(ExpansionSettings(insert_after=(0, 1)), 3)
    expand_folder(source, tmp_path / "deeper", plan, verify=True)
    assert open_folder(tmp_path / "deeper").config.windows == (None, None, 4, 4, 4)
    assert_same_logits(tmp_path / "deeper")
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_logits(tmp_path / "back")
    edit(source, layer_types=["full_attention"] * 3)
    assert open_folder(source).config.windows == (None,) * 3
    assert_same_logits(source)


def test_a_mistral_that_was_expanded_into_the_other_dialect_is_read_and_mended(tmp_path, write_small_model):
    """Up to version 0.1 an expanded Mistral got layer_types and no head_dim, which transformers fails on."""
    source = write_small_model(tmp_path / "source", config_of(Family.MISTRAL))
    edit(source, **dict.fromkeys(NEW_KEYS))
    expected = theirs(source)
    edit(source, layer_types=["sliding_attention"] * 3)
    with pytest.raises(TypeError):
        theirs(source)
    np.testing.assert_allclose(ours(source), expected, atol=2e-5)
    written = convert(source, tmp_path / "mended", Format.HF, verify=True)
    assert written["verified"]["transformers"].startswith("loads with transformers")
    np.testing.assert_array_equal(theirs(tmp_path / "mended"), expected)


@pytest.mark.slow
def test_verify_asks_transformers_for_its_model_of_the_config(
    tmp_path, write_small_model, monkeypatch, real_transformers_check
):
    source = write_small_model(tmp_path / "source", config_of(Family.MISTRAL))
    pytest.importorskip("transformers")
    assert convert(source, tmp_path / "good", verify=True)["verified"]["transformers"].startswith(
        "loads with transformers 5"
    )
    broken = shutil.copytree(source, tmp_path / "broken")
    edit(broken, head_dim=None, layer_types=["sliding_attention"] * 3)
    expected = {"lm_head.weight": (1, 1)}
    with pytest.raises(BadInput, match="transformers does not load its config.json"):
        transformers_check.loaded_by_transformers(broken, source, expected)
    with pytest.raises(BadInput, match="another model of its config.json"):
        transformers_check.loaded_by_transformers(source, source, expected)
    assert transformers_check.loaded_by_transformers(broken, broken, expected).startswith(
        "does not load the source either"
    )
    monkeypatch.setattr(transformers_check.importlib.util, "find_spec", lambda _: None)
    assert "not installed" in transformers_check.loaded_by_transformers(broken, source, expected)
