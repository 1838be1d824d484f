import json
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from babel_jax.config import Family
from babel_jax.errors import BadInput
from babel_jax.model.shapes import leaf_shapes
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.model_folders.transfer import convert
from tests.forced_devices import forced_devices


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_bit_survives_the_way_to_orbax_and_back(tmp_path, write_model, read_bits, dtype, shards):
    source = write_model(tmp_path / "source", dtype=dtype, shards=shards)
    there = convert(source, tmp_path / "orbax")
    back = convert(tmp_path / "orbax", tmp_path / "back", shard_bytes=4000)
    assert read_bits(tmp_path / "back") == read_bits(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert there.keys() >= {"layers", "parameters", "bytes_written", "seconds", "peak_rss_bytes"}
    assert (there["format"], back["format"], there["layers"], back["layers"]) == ("orbax", "hf", 3, 3)
    assert there["parameters"] == sum(np.prod(shape) for _, shape, _ in read_bits(source).values())
    assert back["bytes_written"] == sum(file.stat().st_size for file in (tmp_path / "back").rglob("*"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


def test_shards_stay_under_the_limit_and_the_index_names_every_tensor(tmp_path, write_model, read_bits):
    source = write_model(tmp_path / "source")
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", shard_bytes=3000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    tensors = read_bits(tmp_path / "back")
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    bytes_of = Counter()
    for name, file in index["weight_map"].items():
        bytes_of[file] += len(tensors[name][2])
    assert max(bytes_of.values()) <= 3000


def test_files_beside_the_parameters_come_along_and_weights_do_not(tmp_path, write_model):
    source = write_model(tmp_path / "source")
    kept = {"generation_config.json": "{}", "LICENSE": "text", "README.md": "card", "merges.txt": "a b"}
    for name, text in {
        **kept,
        "pytorch_model.bin": "old",
        "pytorch_model.bin.index.json": "{}",
        ".cache": "x",
    }.items():
        (source / name).write_text(text)
    (source / "runs").mkdir()
    convert(source, tmp_path / "orbax")
    assert {file.name for file in (tmp_path / "orbax").iterdir()} == {
        "config.json",
        "params",
        "SHA256SUMS",
        *kept,
    }
    assert all((tmp_path / "orbax" / name).read_text() == text for name, text in kept.items())


@pytest.mark.parametrize("format", Format)
def test_params_load_in_their_own_type_in_another_and_sharded(tmp_path, write_model, tiny_config, format):
    folder = open_folder(write_model(tmp_path / "source", dtype="float16"))
    if format is Format.ORBAX:
        convert(folder.path, tmp_path / "orbax")
        folder = open_folder(tmp_path / "orbax")
    own = traverse_util.flatten_dict(load_params(folder))
    assert {place: leaf.shape for place, leaf in own.items()} == leaf_shapes(tiny_config)
    assert {leaf.dtype for leaf in own.values()} == {jnp.dtype(jnp.float16)}
    cast = traverse_util.flatten_dict(load_params(folder, dtype=jnp.float32))
    for place, leaf in own.items():
        np.testing.assert_array_equal(np.asarray(leaf).astype(np.float32), cast[place])
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
    shardings = jax.tree.map(lambda _: sharding, traverse_util.unflatten_dict(own))
    sharded = traverse_util.flatten_dict(load_params(folder, shardings=shardings))
    for place, leaf in sharded.items():
        assert leaf.sharding == sharding
        assert np.asarray(leaf).tobytes() == np.asarray(own[place]).tobytes()


LOAD_ON_A_MESH = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.params import load_params

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
for path in sys.argv[1:]:
    folder = open_folder(path)
    whole = load_params(folder)
    split = lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp"))
    sharded = load_params(folder, shardings=jax.tree.map(split, whole))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(sharded))
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), whole, sharded)
    assert jax.tree.all(same), same
"""


def test_each_device_of_a_mesh_is_given_its_part(tmp_path, write_model):
    source = write_model(tmp_path / "source")
    convert(source, tmp_path / "orbax")
    command = [sys.executable, "-c", LOAD_ON_A_MESH, str(source), str(tmp_path / "orbax")]
    done = subprocess.run(command, capture_output=True, text=True, env=forced_devices(8), check=False)
    assert done.returncode == 0, done.stderr


def test_saved_params_load_again_in_both_formats(tmp_path, write_model):
    folder = open_folder(write_model(tmp_path / "source", dtype="float32"))
    params = load_params(folder)
    for format in Format:
        save_folder(tmp_path / format, format, params, folder.hf_config)
        again = load_params(open_folder(tmp_path / format))
        assert jax.tree.all(
            jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params, again)
        )


def test_a_tied_model_may_store_its_output_layer_twice(tmp_path, write_model, tiny_config, read_bits):
    source = write_model(tmp_path / "source", shards=1)
    bits = read_bits(source)
    untied = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**untied, "tie_word_embeddings": True}))
    with pytest.raises(BadInput, match=r"tie_word_embeddings.*lm_head.weight differs"):
        load_params(open_folder(source))
    params = load_params(open_folder(write_model(tmp_path / "plain", shards=1)))
    params["lm_head"] = {"weight": params["model"]["embed_tokens"]["weight"]}
    save_folder(tmp_path / "twice", Format.HF, params, untied)
    (tmp_path / "twice" / "config.json").write_text(json.dumps({**untied, "tie_word_embeddings": True}))
    convert(tmp_path / "twice", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == {
        name: value for name, value in bits.items() if name != "lm_head.weight"
    }


CASES = [
    ("qwen2", {"tie_word_embeddings": False}, "bfloat16"),
    ("qwen2", {"tie_word_embeddings": True}, "float32"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "float32"),
    ("llama", {"tie_word_embeddings": True}, "float16"),
    ("qwen3", {"head_dim": 16}, "bfloat16"),
    (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "attention_bias": True,
        },
        "float32",
    ),
    ("mistral", {"sliding_window": 6}, "bfloat16"),
    ("mistral", {"sliding_window": None, "head_dim": 16}, "float32"),
    (
        "gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0},
        "bfloat16",
    ),
    (
        "gemma2",
        {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": None, "tie_word_embeddings": False},
        "float32",
    ),
    (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        "bfloat16",
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "float32",
    ),
]


@pytest.mark.parametrize(("family", "options", "dtype"), CASES)
def test_transformers_folders_come_back_the_same(tmp_path, read_bits, family, options, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kinds = {
        Family.QWEN2: (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        Family.QWEN3: (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        Family.LLAMA: (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        Family.MISTRAL: (transformers.MistralConfig, transformers.MistralForCausalLM),
        Family.GEMMA2: (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    }
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config_class, model_class = kinds[Family(family)]
    torch.manual_seed(0)
    model = model_class(config_class(**shape, **options)).to(getattr(torch, dtype))
    with torch.no_grad():  # biases and norms begin as zeros and ones, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1

    convert(tmp_path / "source", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", shard_bytes=20_000)

    assert read_bits(tmp_path / "back") == read_bits(tmp_path / "source")
    given, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "back")
    )
    assert {key: written[key] for key in given} == given
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert (written["torch_dtype"], written["dtype"]) == (dtype, dtype)
    # Both from disk: casting a model in memory rounds its rotary frequencies too, which are no parameters.
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
        for name in ("source", "back")
    )
    assert after.dtype == before.dtype == model.dtype
    tokens = torch.arange(40).reshape(2, 20) % 96
    with torch.no_grad():
        assert torch.equal(after(tokens).logits, before(tokens).logits)
