import json
import os
import shutil

import jax
import numpy as np
import pytest
from orbax.checkpoint import PyTreeCheckpointer
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.model_folders.transfer import convert

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap_shape(tensors):
    tensors["model.embed_tokens.weight"] = np.ascontiguousarray(tensors["model.embed_tokens.weight"].T)


def to_one_other_type(tensors):
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].astype(
        np.float32
    )


def to_integers(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].view(np.int16)


DAMAGES = {
    "a shard is missing": (lambda f: (f / SECOND).unlink(), [INDEX, SECOND, "missing"]),
    "a shard is truncated": (lambda f: truncate(f / SECOND), [SECOND, "truncated"]),
    "a shard is empty": (lambda f: (f / FIRST).write_bytes(b""), [FIRST, "truncated"]),
    "a shard is something else": (
        lambda f: (f / FIRST).write_bytes(b"<html>" * 99),
        [FIRST, "not a safetensors file"],
    ),
    "the index names a missing file": (
        lambda f: edit_json(
            f / INDEX,
            lambda i: i["weight_map"].update({"lm_head.weight": "model-00009-of-00002.safetensors"}),
        ),
        [INDEX, "model-00009-of-00002.safetensors", "missing"],
    ),
    "the index names the wrong shard": (
        lambda f: edit_json(
            f / INDEX, lambda i: i["weight_map"].update({"model.embed_tokens.weight": SECOND})
        ),
        [INDEX, "model.embed_tokens.weight", SECOND],
    ),
    "the index leaves the folder": (
        lambda f: edit_json(
            f / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../secret.safetensors"})
        ),
        [INDEX, "outside"],
    ),
    "the index is no index": (lambda f: (f / INDEX).write_text("[]"), [INDEX, "weight_map"]),
    "the index is missing": (lambda f: (f / INDEX).unlink(), ["2 safetensors files", INDEX]),
    "a tensor is missing": (
        lambda f: (
            edit_tensors(f / FIRST, lambda t: t.pop("model.embed_tokens.weight")),
            edit_json(f / INDEX, lambda i: i["weight_map"].pop("model.embed_tokens.weight")),
        ),
        ["missing tensor model.embed_tokens.weight", "config.json"],
    ),
    "a layer is missing": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=4, layer_types=None)),
        ["missing 12 tensors", "model.layers.3."],
    ),
    "a tensor is unexpected": (
        lambda f: edit_tensors(
            f / FIRST, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)})
        ),
        [FIRST, "unexpected tensor model.layers.0.self_attn.q_norm.weight"],
    ),
    "layers are left over": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=2, layer_types=None)),
        ["unexpected 12 tensors", "model.layers.2."],
    ),
    "a tensor has another shape": (
        lambda f: edit_tensors(f / FIRST, swap_shape),
        [FIRST, "model.embed_tokens.weight", "[16, 48]", "[48, 16]"],
    ),
    "a layer has another type": (
        lambda f: edit_tensors(f / FIRST, to_one_other_type),
        ["model/layers/mlp/down_proj/weight", "bfloat16, float32"],
    ),
    "a type is not supported": (
        lambda f: edit_tensors(f / FIRST, to_integers),
        [FIRST, "type I16", "BF16, F16, F32"],
    ),
    "config.json is missing": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config.json is cut": (lambda f: truncate(f / "config.json"), ["config.json", "not a readable JSON"]),
    "config.json is no object": (
        lambda f: (f / "config.json").write_text("3"),
        ["config.json", "not a JSON object"],
    ),
    "config.json is not UTF-8": (
        lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'),
        ["config.json", "not a readable JSON"],
    ),
    "config.json is of another architecture": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="gpt2")),
        ["config.json", "'gpt2'", "qwen2", "llama"],
    ),
    "there are no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        ["neither safetensors files nor an Orbax params/"],
    ),
    "both formats are there": (lambda f: (f / "params").mkdir(), ["both safetensors files and params/"]),
    "the tokenizer is larger than the embedding": (
        lambda f: Tokenizer(models.WordLevel({f"word{i}": i for i in range(49)}, "word0")).save(
            str(f / "tokenizer.json")
        ),
        ["ids up to 48", "48 rows"],
    ),
    "the tokenizer is damaged": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        ["tokenizer cannot be read"],
    ),
    "the tokenizer is too large": (
        lambda f: [(f / "tokenizer.json").touch(), os.truncate(f / "tokenizer.json", 48 * 2**20 + 1)],
        ["tokenizer cannot be read", "larger than the 50,331,648 bytes"],
    ),
    "the SentencePiece model is damaged": (
        lambda f: (f / "tokenizer.model").write_bytes(b"abc"),
        ["tokenizer cannot be read"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_hf_folder_is_refused_in_one_line(tmp_path, write_model, damage):
    folder = write_model(tmp_path / "folder")
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(BadInput) as raised:
        convert(folder, tmp_path / "out")
    message = str(raised.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    for word in words:
        assert word in message
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def only_file(folder, name):
    return next(folder.rglob(name))


def largest_file(folder):
    return max(
        (file for file in (folder / "state").rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )


def rewrite_same_size(path):
    path.write_bytes(path.read_bytes().replace(b"embed_tokens", b"embed_tikens"))


ORBAX_DAMAGES = {
    "params/ is empty": lambda p: (shutil.rmtree(p), p.mkdir()),
    "the tree's description is missing": lambda p: only_file(p, "_METADATA").unlink(),
    "the tree's description is cut": lambda p: truncate(only_file(p, "_METADATA")),
    "the manifest is missing": lambda p: (p / "state" / "manifest.ocdbt").unlink(),
    "the data is truncated": lambda p: truncate(largest_file(p)),
    "the tree's description is another": lambda p: rewrite_same_size(only_file(p, "_METADATA")),
    "the data is missing": lambda p: largest_file(p).unlink(),
}


@pytest.mark.parametrize("damage", ORBAX_DAMAGES)
def test_a_damaged_orbax_folder_is_refused_in_one_line(tmp_path, write_model, damage, capfd):
    convert(write_model(tmp_path / "source"), tmp_path / "orbax")
    ORBAX_DAMAGES[damage](tmp_path / "orbax" / "params")
    with pytest.raises(BadInput, match="damaged Orbax parameters") as raised:
        convert(tmp_path / "orbax", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_orbax_params_of_another_shape_are_refused(tmp_path, write_model):
    convert(write_model(tmp_path / "source"), tmp_path / "orbax")
    edit_json(tmp_path / "orbax" / "config.json", lambda config: config.update(vocab_size=50))
    with pytest.raises(
        BadInput,
        match=r"(model/embed_tokens|lm_head)/weight has shape \[48, 16\]; config.json calls for \[50, 16\]",
    ):
        load_params(open_folder(tmp_path / "orbax"))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64"])
def test_orbax_params_of_another_type_are_refused(tmp_path, write_model, dtype):
    source = write_model(tmp_path / "source")
    with jax.enable_x64():
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), load_params(open_folder(source)))
        save_folder(tmp_path / "orbax", Format.ORBAX, params, open_folder(source).hf_config)
    for use in (load_params, lambda folder: convert(folder.path, tmp_path / "out")):
        with pytest.raises(BadInput, match=f"has type {dtype}; supported: bfloat16, float16, float32"):
            use(open_folder(tmp_path / "orbax"))


@pytest.mark.filterwarnings(
    "ignore:Sharding info not provided when restoring"
)  # Orbax's, when a tree is read as it was saved
def test_an_orbax_checkpoint_of_the_old_layout_is_named_so_and_can_be_written_anew(
    tmp_path, write_model, read_bits
):
    source = open_folder(write_model(tmp_path / "source"))
    old = tmp_path / "old" / "params"
    PyTreeCheckpointer().save(old, load_params(source))
    shutil.copy(source.path / "config.json", old.parent)
    with pytest.raises(
        BadInput, match=r"old/params: not in the layout of Orbax v1 .*: save\(NEW, load\(OLD\)\)$"
    ):
        convert(old.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ocp.save(tmp_path / "new" / "params", ocp.load(old))
    shutil.copy(source.path / "config.json", tmp_path / "new")
    convert(tmp_path / "new", tmp_path / "out")
    assert read_bits(tmp_path / "out") == read_bits(source.path)


def test_an_orbax_checkpoint_of_another_tree_is_refused(tmp_path, write_model):
    source = open_folder(write_model(tmp_path / "source"))
    (tmp_path / "orbax").mkdir()
    shutil.copy(source.path / "config.json", tmp_path / "orbax")
    ocp.save(tmp_path / "orbax" / "params", {"params": load_params(source), "step": 3})
    with pytest.raises(BadInput, match="missing 15 tensors"):
        convert(tmp_path / "orbax", tmp_path / "out")


def test_params_that_are_not_the_model_of_the_config_are_not_saved(tmp_path, write_model):
    folder = open_folder(write_model(tmp_path / "source"))
    params = load_params(folder)
    del params["lm_head"]
    with pytest.raises(BadInput, match="missing tensor lm_head/weight"):
        save_folder(tmp_path / "out", Format.HF, params, folder.hf_config)


def test_no_folder_and_a_file_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such model folder"):
        open_folder(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="a model folder is needed"):
        open_folder(tmp_path / "file")


def test_an_output_that_exists_is_not_touched(tmp_path, write_model):
    source = write_model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        convert(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_output_inside_of_the_source_is_refused_at_once(tmp_path, write_model):
    source = write_model(tmp_path / "source")
    with pytest.raises(BadInput, match="inside of the folder that is read"):
        convert(source, source / "orbax")
    assert not list(source.glob("orbax*"))


def test_rotary_buffers_of_old_files_are_passed_over(tmp_path, write_model, read_bits):
    source = write_model(tmp_path / "source", shards=1)
    bits = read_bits(source)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    edit_tensors(source / "model.safetensors", lambda tensors: tensors.update(buffer))
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == bits


def test_a_tokenizer_is_missed_only_where_it_is_needed(tmp_path):
    check_vocabulary(tmp_path, 10)
    with pytest.raises(BadInput, match="no tokenizer"):
        check_vocabulary(tmp_path, 10, needed=True)
    Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a")).save(str(tmp_path / "tokenizer.json"))
    check_vocabulary(tmp_path, 10, needed=True)
