import copy
import json

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

import babel_jax
from babel_jax.config import ExpansionSettings, Family, Init, LayerType
from babel_jax.errors import BadInput
from babel_jax.expansion.apply import expand_params
from babel_jax.expansion.folders import expand_folder, expand_hf_config
from babel_jax.expansion.plan import plan_from_json, plan_from_settings
from babel_jax.model.decoder import forward
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.transfer import convert

AMONG = ExpansionSettings(insert_after=(1, 2))


def layer_bits(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), params["model"]["layers"])


@pytest.mark.parametrize(
    ("init", "dtype"),
    [
        (Init.COPY, "bfloat16"),
        (Init.COPY, "float32"),
        (Init.NOISE, "bfloat16"),
        (Init.NOISE, "float16"),
        (Init.ZERO, "float16"),
        (Init.AVERAGE, "bfloat16"),
        (Init.IDENTITY, "bfloat16"),
        (Init.SCALED, "float16"),
    ],
)
def test_both_formats_give_the_same_bits(tmp_path, write_small_model, read_tensors, init, dtype):
    source = write_small_model(tmp_path / "source", dtype=dtype)
    (source / "vocab.txt").write_text("a")
    plan = plan_from_settings(
        AMONG.model_copy(update={"init": init, "noise_mean": 0.05, "noise_std": 0.05, "seed": 3}), 4
    )
    hf = expand_folder(source, tmp_path / "hf", plan, shard_bytes=20_000)
    convert(source, tmp_path / "orbax")
    orbax = expand_folder(tmp_path / "orbax", tmp_path / "orbax_deeper", plan)
    convert(tmp_path / "orbax_deeper", tmp_path / "back")

    before, after, same = (read_tensors(tmp_path / name) for name in ("source", "hf", "back"))
    assert {name: (value.dtype, value.tobytes()) for name, value in after.items()} == {
        name: (value.dtype, value.tobytes()) for name, value in same.items()
    }
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    whole = layer_bits(expand_params(load_params(open_folder(source)), plan))
    assert whole == layer_bits(load_params(open_folder(tmp_path / "orbax_deeper")))
    for name, value in after.items():
        *head, layer, rest = name.split(".", 3) if name.startswith("model.layers.") else (name, None, None)
        source_name = name if layer is None else ".".join((*head, str(plan.source_layers[int(layer)]), rest))
        if (
            layer is None
            or (int(layer) not in plan.new_layers and init is not Init.SCALED)
            or init is Init.COPY
        ):
            assert value.tobytes() == before[source_name].tobytes()
        elif init is not Init.ZERO and init is not Init.NOISE:
            changed = init is Init.AVERAGE or rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            untouched = init is Init.SCALED and plan.layers[int(layer)].output_scale == 1.0
            assert (value.tobytes() != before[source_name].tobytes()) == (changed and not untouched)
        else:
            assert value.tobytes() != before[source_name].tobytes()
            assert value.any() == (init is not Init.ZERO)
    for result, format in ((hf, "hf"), (orbax, "orbax")):
        assert result.keys() >= {"layers", "parameters", "bytes_written", "seconds", "peak_rss_bytes"}
        assert (result["format"], result["layers"], result["new_layers"]) == (format, 6, [2, 4])
        assert result["parameters"] == sum(value.size for value in after.values())
    assert (
        (tmp_path / "orbax_deeper" / "vocab.txt").read_text()
        == (tmp_path / "hf" / "vocab.txt").read_text()
        == "a"
    )


@pytest.mark.parametrize(
    ("family", "tied"), [(Family.QWEN2, False), (Family.QWEN2, True), (Family.LLAMA, True)]
)
def test_transformers_loads_the_deeper_folder(tmp_path, write_small_model, small_config, family, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = small_config.model_copy(
        update={"family": family, "qkv_bias": family is Family.QWEN2, "tie_word_embeddings": tied}
    )
    source = write_small_model(tmp_path / "source", config)
    plan = plan_from_settings(AMONG, 4)
    expand_folder(source, tmp_path / "deeper", plan)
    tokens = np.arange(24).reshape(2, 12) % config.vocab_size

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deeper", local_files_only=True)
    shallow = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
    by_hand = torch.nn.ModuleList(
        copy.deepcopy(shallow.model.layers[source]) for source in plan.source_layers
    )
    for position, layer in enumerate(by_hand):
        layer.self_attn.layer_idx = position
    shallow.model.layers, shallow.config.num_hidden_layers = by_hand, len(by_hand)
    if shallow.config.__dict__.get("layer_types"):
        shallow.config.layer_types = ["full_attention"] * len(by_hand)
    with torch.no_grad():
        logits = theirs(torch.as_tensor(tokens)).logits
        assert torch.equal(logits, shallow(torch.as_tensor(tokens)).logits)

    folder = open_folder(tmp_path / "deeper")
    ours = jax.jit(forward, static_argnums=0)(folder.config, load_params(folder), tokens)
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4)
    assert (np.argmax(ours, -1) == logits.numpy().argmax(-1)).all()


@pytest.mark.parametrize("std", [0.0, 1e-34, 0.25])
def test_noise_on_denormals_has_the_bits_of_a_model_in_memory(tmp_path, write_small_model, std):
    """XLA for CPU takes denormals for zeros, so noise of 0 changes them."""
    source = write_small_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for value in tensors.values():
        value *= 1e-38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = {"init": Init.NOISE, "noise_mean": 0.0, "noise_std": std}
    plan = plan_from_settings(AMONG.model_copy(update=settings), 4)
    expand_folder(source, tmp_path / "deeper", plan)
    whole = jax.jit(expand_params, static_argnums=1)(load_params(open_folder(source)), plan)
    assert layer_bits(whole) == layer_bits(load_params(open_folder(tmp_path / "deeper")))


def test_config_tells_the_plan_and_where_it_comes_from(tmp_path, write_small_model):
    source = write_small_model(tmp_path / "qwen-tiny", of_mine=[1])
    plan = plan_from_settings(
        AMONG.model_copy(update={"init": Init.NOISE, "noise_mean": 0.5, "noise_std": 0.25, "seed": 9}), 4
    )
    expand_folder(source, tmp_path / "deeper", plan)
    written = json.loads((tmp_path / "deeper" / "config.json").read_text())
    provenance = written["babel_expansion"]
    assert (provenance["source"], provenance["babel_jax"]) == ("qwen-tiny", babel_jax.__version__)
    assert provenance["source_num_hidden_layers"] == 4
    assert plan_from_json({"layers": provenance["layers"]}, "config.json") == plan
    assert (written["num_hidden_layers"], len(written["layer_types"]), written["max_window_layers"]) == (
        6,
        6,
        6,
    )
    before = json.loads((source / "config.json").read_text())
    changed = {"num_hidden_layers", "layer_types", "max_window_layers", "babel_expansion"}
    assert {key: value for key, value in written.items() if key not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }

    expand_folder(
        tmp_path / "deeper", tmp_path / "deepest", plan_from_settings(ExpansionSettings(append=1), 6)
    )
    again = json.loads((tmp_path / "deepest" / "config.json").read_text())["babel_expansion"]
    assert (again["source"], again["before"]) == ("deeper", provenance)


FULL, SLIDING = str(LayerType.FULL), str(LayerType.SLIDING)


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize(
    ("window_layers", "settings", "expected", "types"),
    [
        (4, {"insert_after": (1, 2)}, 6, [FULL] * 6),
        (2, {"insert_after": (1, 2)}, 3, [FULL] * 3 + [SLIDING] * 3),
        (2, {"insert_after": (2,)}, 2, [FULL] * 2 + [SLIDING] * 3),
        (0, {"insert_after": (0,)}, 0, [SLIDING] * 5),
        (28, {"insert_after": (1, 2)}, 28, [FULL] * 6),
        (3, {"append": 2}, 3, [FULL] * 3 + [SLIDING, FULL, SLIDING]),
    ],
)
def test_max_window_layers_keeps_its_meaning(small_config, use, window_layers, settings, expected, types):
    from babel_jax.model_folders.hf_config import read_hf_config, write_hf_config

    old = {
        key: value
        for key, value in write_hf_config(small_config).items()
        if key not in ("layer_types", "rope_parameters", "dtype")
    }
    old |= {"use_sliding_window": use, "sliding_window": 8, "max_window_layers": window_layers}
    plan = plan_from_settings(ExpansionSettings(**settings), 4)
    deeper = expand_hf_config(old, plan, "source")
    assert deeper["max_window_layers"] == expected
    assert read_hf_config(deeper, "deeper").windows == tuple(
        8 if use and kind == SLIDING else None for kind in types
    )
    if use and expected < len(types):
        assert deeper["layer_types"] == types
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config.from_dict(deeper)
    assert theirs.layer_types == (types if use else [FULL] * len(types))


def test_layers_of_different_types_keep_theirs_in_safetensors(tmp_path, write_small_model, read_tensors):
    source = write_small_model(tmp_path / "source", dtype="float16")
    tensors = read_tensors(source)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, source / "model.safetensors")
    expand_folder(source, tmp_path / "deeper", plan_from_settings(AMONG, 4))
    deeper = read_tensors(tmp_path / "deeper")
    assert [str(deeper[f"model.layers.{layer}.mlp.up_proj.weight"].dtype) for layer in range(4)] == [
        "float16",
        "float32",
        "float32",
        "float16",
    ]


def test_bad_input_is_refused_before_anything_is_written(tmp_path, write_small_model):
    source = write_small_model(tmp_path / "source")
    with pytest.raises(BadInput, match="keeps 3 layers, and the model has 4"):
        expand_folder(source, tmp_path / "out", plan_from_settings(ExpansionSettings(append=1), 3))
    plan = plan_from_settings(AMONG, 4)
    with pytest.raises(BadInput, match="no such model folder"):
        expand_folder(tmp_path / "nothing", tmp_path / "out", plan)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(BadInput, match="truncated"):
        expand_folder(source, tmp_path / "out", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        expand_folder(source, tmp_path / "full", plan)


@pytest.mark.parametrize("orbax", [False, True])
def test_a_deeper_model_has_a_card_of_its_own(tmp_path, write_small_model, orbax):
    source = write_small_model(tmp_path / "Small")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Small\n")
    if orbax:
        convert(source, tmp_path / "converted")
        source = (tmp_path / "converted").rename(tmp_path / "Small-orbax")
        assert (source / "README.md").read_text() == "---\nlicense: mit\n---\n# Small\n"
    noisy = AMONG.model_copy(update={"init": Init.NOISE, "noise_mean": 0.25, "noise_std": 0.5})
    expand_folder(source, tmp_path / "deeper", plan_from_settings(noisy, 4))
    card = ModelCard.load(tmp_path / "deeper" / "README.md")
    assert (card.data.license, card.data.base_model, card.data["made_from"]) == ("mit", None, source.name)
    assert card.text.strip().startswith("# deeper\n")
    assert ("AutoModelForCausalLM" in card.text) == (not orbax)
    assert "The new layers have not been trained." in card.text
    assert card.data.tags == ["babel-jax", "depth-expansion"]
    assert "of 4 layers became 6 layers" in card.text
    assert "| 2 | 1 | copy and noise N(0.25, 0.5) |\n| 4 | 2 | copy" in card.text
    assert (tmp_path / "deeper" / "README.base.md").read_text() == "---\nlicense: mit\n---\n# Small\n"
    expand_folder(
        tmp_path / "deeper", tmp_path / "deepest", plan_from_settings(ExpansionSettings(append=1), 6)
    )
    text = (tmp_path / "deepest" / "README.md").read_text()
    assert text.index("of 4 layers became 6 layers") < text.index("of 6 layers became 7 layers")
