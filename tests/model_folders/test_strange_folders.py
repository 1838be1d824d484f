"""Model folders as strangers may make them: what is read outside of them, what is no file, and names and
copies of tensors.
"""

import json
import logging
import os
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from babel_jax.errors import BadInput
from babel_jax.expansion.folders import expand_folder
from babel_jax.expansion.plan import plan_from_json
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.safetensors_files import StoredTensors
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.model_folders.transfer import convert

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def refused(source, out, *words):
    with pytest.raises(BadInput) as raised:
        convert(source, out)
    assert not out.exists()
    assert not list(out.parent.glob("out*"))
    for word in words:
        assert word in str(raised.value)


def test_no_file_of_a_folder_says_where_its_values_are(tmp_path, write_model, read_bits):
    source, other = write_model(tmp_path / "source"), write_model(tmp_path / "other")
    tensors = load_file(other / FIRST)
    save_file(
        {name: np.zeros_like(value) for name, value in tensors.items()},
        other / FIRST,
        metadata={"format": "pt"},
    )
    (source / ".remote").write_text(f"file://{other}")
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == read_bits(source)


@pytest.mark.parametrize("target", ["/proc/self/environ", "../secret", "nothing"])
@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "README.md", "generation_config.json", "config.json", FIRST, INDEX]
)
def test_links_that_lead_out_of_the_folder_are_refused(tmp_path, write_model, name, target):
    source = write_model(tmp_path / "source")
    (tmp_path / "secret").write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(target)
    refused(source, tmp_path / "out", str(source / name), "a link to")


def test_links_to_folders_are_refused_where_they_would_be_read(tmp_path, write_model):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "one.jinja").write_text("secret")
    source = write_model(tmp_path / "source")
    (source / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    refused(source, tmp_path / "out", "one.jinja", "outside of the folder")
    (source / "additional_chat_templates").unlink()
    convert(source, tmp_path / "orbax")
    shutil.move(tmp_path / "orbax" / "params", tmp_path / "params")
    (tmp_path / "orbax" / "params").symlink_to(tmp_path / "params")
    with pytest.raises(BadInput, match="outside of the folder"):
        convert(tmp_path / "orbax", tmp_path / "back")


def test_links_inside_of_the_folder_and_of_the_hubs_cache_are_followed(tmp_path, write_model, read_bits):
    model = write_model(tmp_path / "model")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (model / "LICENSE").write_text("free")
    for number, file in enumerate(model.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    convert(snapshot, tmp_path / "out", Format.HF)
    assert read_bits(tmp_path / "out") == read_bits(model)
    assert (tmp_path / "out" / "NOTICE").read_text() == "free"
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "tokenizer.model", "README.md", "config.json", FIRST, INDEX]
)
@pytest.mark.parametrize("kind", ["fifo", "sparse"])
def test_what_is_no_file_or_too_large_is_refused_at_once(tmp_path, write_model, name, kind):
    source = write_model(tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(source / name)
    else:
        with open(source / name, "wb") as file:
            file.truncate(4 * 2**40)
    refused(source, tmp_path / "out", str(source / name))


@pytest.mark.parametrize("kind", ["fifo", "sparse"])
def test_strange_files_in_an_orbax_folder(tmp_path, write_model, kind):
    convert(write_model(tmp_path / "source"), tmp_path / "orbax")
    manifest = tmp_path / "orbax" / "params" / "state" / "manifest.ocdbt"
    manifest.unlink()
    if kind == "fifo":
        os.mkfifo(manifest)
    else:
        with open(manifest, "wb") as file:
            file.truncate(4 * 2**40)
    with pytest.raises(BadInput, match="manifest.ocdbt"):
        convert(tmp_path / "orbax", tmp_path / "back")


def with_header(path, change):
    """Writes the header of a safetensors file anew."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlapping(header):
    names = [name for name in header if name != "__metadata__"]
    return {**header, names[0]: header[names[1]]}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda header: b"[" * 100_000, "damaged"),
        (lambda header: b'{"a":' * 100 + b"1" + b"}" * 100, "damaged"),
        (overlapping, "damaged"),
        (lambda header: {**header, "__metadata__": {"dtype": 3}}, "damaged"),
        (
            lambda header: json.dumps(header).replace("{", '{"__metadata__":{"format":"pt"},', 1).encode(),
            "damaged",
        ),
        (
            lambda header: (
                json.dumps(header)[:-1].encode()
                + b',"model.norm.weight":'
                + json.dumps(header["model.norm.weight"]).encode()
                + b"}"
            ),
            "more than once",
        ),
        (lambda header: [], "damaged"),
        (
            lambda header: {
                **header,
                "lm_head.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**64 - 1]},
            },
            "damaged",
        ),
        (
            lambda header: {**header, "x" * 2**24: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
            "at most 16,777,216 are read",
        ),
    ],
)
def test_bad_headers_are_one_line(tmp_path, write_model, change, word):
    source = write_model(tmp_path / "source", shards=1)
    with_header(source / "model.safetensors", change)
    refused(source, tmp_path / "out", "model.safetensors", word)


@pytest.mark.parametrize(
    "metadata", [None, {"dtype": "F32"}, {"format": "pt", "dtype": "x", "data_offsets": "y"}]
)
def test_metadata_that_looks_like_a_tensor_is_metadata(tmp_path, write_model, read_bits, metadata):
    source = write_model(tmp_path / "source", shards=1)
    before = read_bits(source)
    with_header(source / "model.safetensors", lambda header: {**header, "__metadata__": metadata})
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == before


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "x" * 10_000},
        {"a": "nul\0"},
        {"a": 3},
        {"a": "."},
        {"a": ".."},
        {"a": "\x1b[31m\n"},
        [],
        None,
        {},
        {"a": "config.json"},
    ],
)
def test_bad_indexes_are_one_line(tmp_path, write_model, weight_map):
    source = write_model(tmp_path / "source")
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadInput) as raised:
        convert(source, tmp_path / "out")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 3000


def add_copy(source, change):
    """Puts a tensor of the first file into the second too."""
    first, second = load_file(source / FIRST), load_file(source / SECOND)
    name = sorted(first)[0]
    second[name] = change(first[name])
    save_file(second, source / SECOND, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_a_tensor_in_two_files_counts_once_where_both_are_the_same(tmp_path, write_model, read_bits, named):
    source = write_model(tmp_path / "source")
    before = read_bits(source)
    name = add_copy(source, lambda values: values)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][name] = named
    (source / INDEX).write_text(json.dumps(index))
    plan = plan_from_json({"layers": [{"source": 0}, {"source": 1}, {"source": 2}, {"source": 2}]}, "plan")
    expand_folder(source, tmp_path / "deeper", plan, verify=True, share=True)
    for folder in (tmp_path / "deeper",):
        written = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file)]
        assert len(written) == len(set(written))
        assert {name: bits for name, bits in read_bits(folder).items() if name in before} == before
    add_copy(source, lambda values: values.view(np.uint16) ^ np.uint16(1))
    refused(source, tmp_path / "out", FIRST, SECOND, name, "different values")


@pytest.mark.parametrize("shards", [1, 2])
def test_names_without_their_prefix(tmp_path, write_model, read_bits, tiny_config, shards):
    """As of a model that was saved without its output layer (Qwen2Model)."""
    config = tiny_config.model_copy(update={"tie_word_embeddings": True})
    source = write_model(tmp_path / "source", config, shards=shards)
    before = read_bits(source)
    index = {}
    for file in source.glob("*.safetensors"):
        tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
    if shards > 1:
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    convert(source, tmp_path / "same", Format.HF, verify=True)
    assert read_bits(tmp_path / "same") == before
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    stored = StoredTensors(source)
    assert {name for name in theirs if name != "lm_head.weight"} == set(stored.file_of)
    assert load_params(open_folder(source))["model"]["norm"]["weight"].shape == (config.hidden_size,)


def test_a_missing_output_layer_without_prefix_is_named(tmp_path, write_model):
    source = write_model(tmp_path / "source", shards=1)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()}, source / "model.safetensors"
    )
    refused(source, tmp_path / "out", "missing tensor lm_head.weight")


def test_a_padding_token_beyond_the_embedding_is_told_and_others_are_refused(tmp_path, caplog, tiny_config):
    vocabulary = {f"word{number}": number for number in range(10)}
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"},
        "added_tokens": [],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 10}')
    with caplog.at_level(logging.WARNING, "babel"):
        check_vocabulary(tmp_path, 10)
    assert "<pad> has no row" in caplog.text
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 10, "<|end|>": 11}')
    with pytest.raises(BadInput, match="ids up to 11 and the embedding has 10 rows"):
        check_vocabulary(tmp_path, 10)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"12": {"content": "<|x|>"}}})
    )
    with pytest.raises(BadInput, match="ids up to 12"):
        check_vocabulary(tmp_path, 10)
    written = write_hf_config(tiny_config, pad_token_id=tiny_config.vocab_size)
    assert written["pad_token_id"] is None


@pytest.mark.parametrize(
    "tokenizer",
    ["[]", "3", "{}", '{"model": null}', '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "x"}}}',
    '{"model": {"vocab": [1]}}',
     '{"model": {"vocab": {}}, "added_tokens": [3]}', '{"model": {"vocab": {"a": 2147483648}}}', "[" * 5000],
)  # fmt: skip
def test_odd_tokenizers_are_one_line(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(BadInput, match="tokenizer"):
        check_vocabulary(tmp_path, 100)


def test_files_whose_names_are_ours_are_not_taken_over(tmp_path, write_model, read_bits):
    source = write_model(tmp_path / "source")
    for name in ("params", "progress.jsonl"):
        (source / name).write_text("theirs")
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == read_bits(source)
    assert not (tmp_path / "back" / "progress.jsonl").exists()


def test_what_cannot_fit_on_the_disk_is_said_before_hours_of_writing(tmp_path, write_model, monkeypatch):
    source = write_model(tmp_path / "source")
    monkeypatch.setattr(
        "babel_jax.model_folders.transfer.shutil.disk_usage", lambda _: type("", (), {"free": 1000})
    )
    refused(source, tmp_path / "out", "no space left on the disk")


def test_templates_beside_survive_a_command_that_goes_on(tmp_path, write_model, monkeypatch):
    """A folder of templates that an earlier run had copied was an error to the next."""
    source = write_model(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    with monkeypatch.context() as patch:
        patch.setattr(
            "babel_jax.model_folders.transfer.check_unchanged",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir()
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path, write_model):
    """transformers reads the single file, and we read what the index names."""
    source, other = write_model(tmp_path / "source"), write_model(tmp_path / "other", shards=1)
    shutil.copy(other / "model.safetensors", source / "model.safetensors")
    refused(source, tmp_path / "out", "an index that does not name it")
    (source / INDEX).unlink()
    convert(source, tmp_path / "out")
