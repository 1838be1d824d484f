import json
import logging

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax import buckets
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.model_folders.folder import Format, open_folder
from babel_jax.model_folders.object_storage import RemoteFiles
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.model_folders.transfer import convert


@pytest.fixture
def remote(request, tmp_path, write_model):
    """A model folder, and the URL of its copy in fsspec's memory."""
    source = write_model(tmp_path / "source")
    (source / "pytorch_model.bin").write_text("not to be fetched")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    system = fsspec.filesystem("memory")
    system.put(str(source), "/bucket/model", recursive=True)
    yield source, "memory://bucket/model"
    system.rm("/bucket", recursive=True)


def test_a_folder_on_object_storage_is_read_in_place(remote, tmp_path, read_bits, caplog):
    source, url = remote
    folder = open_folder(url)
    assert folder.format is Format.HF
    assert folder.hf_config == json.loads((source / "config.json").read_text())
    assert folder.path.name == "model"
    assert not (folder.path / "pytorch_model.bin").exists()
    with caplog.at_level(logging.DEBUG, "babel"):
        params = load_params(folder)
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        params,
        load_params(open_folder(source)),
    )
    assert jax.tree.all(same)
    assert caplog.records[-1].args[-1] == sum(len(data) for _, _, data in read_bits(source).values())
    # What stands in for it holds headers and holes, and takes no room on the disk.
    assert sum(file.stat().st_blocks for file in folder.path.glob("*.safetensors")) * 512 <= 2 * 8192

    convert(url, tmp_path / "orbax", verify=True)
    convert(tmp_path / "orbax", tmp_path / "back")
    assert read_bits(tmp_path / "back") == read_bits(source)
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    save_folder(tmp_path / "saved", Format.HF, params, folder.hf_config, folder.path)
    assert not list((tmp_path / "saved").glob(".*"))


def test_a_stand_in_never_gives_its_holes(remote, tmp_path):
    """Even opened as a local folder, values come from where they are."""
    source, url = remote
    path = open_folder(url).path
    leaf = load_params(open_folder(path))["model"]["norm"]["weight"]
    assert (
        np.asarray(leaf).tobytes()
        == np.asarray(load_params(open_folder(source))["model"]["norm"]["weight"]).tobytes()
    )


def test_tokenizers_are_found_there_too(remote, small_model):
    _, url = remote
    fsspec.filesystem("memory").put(str(small_model), "/bucket/model/tokenizer.model")
    assert open_tokenizer(open_folder(url).path).fingerprint == open_tokenizer(small_model).fingerprint


def test_what_cannot_be_read_is_said_in_one_line(remote, monkeypatch):
    source, url = remote
    system = fsspec.filesystem("memory")
    with pytest.raises(BadInput, match=r"memory://bucket/other: no such model folder"):
        open_folder("memory://bucket/other")
    with pytest.raises(BadInput, match=r"nosuch://bucket/model: cannot be read \(Protocol not known: nosuch"):
        open_folder("nosuch://bucket/model")
    folder = open_folder(url)
    shard = "model-00002-of-00002.safetensors"
    whole = system.cat_file(f"/bucket/model/{shard}")
    system.pipe_file(f"/bucket/model/{shard}", whole[:-100])
    with pytest.raises(BadInput, match=rf"{url}/{shard}: shorter than when it was opened"):
        load_params(folder)
    with pytest.raises(BadInput, match=r"truncated or damaged"):
        load_params(open_folder(url))
    system.pipe_file(f"/bucket/model/{shard}", whole[:20])
    with pytest.raises(BadInput, match=rf"{url}/{shard}: truncated or damaged"):
        open_folder(url)
    system.rm(f"/bucket/model/{shard}")
    with pytest.raises(BadInput, match=rf"names {shard}, which is missing"):
        load_params(open_folder(url))
    system.pipe_file(f"/bucket/model/{shard}", whole)

    def unreachable(*_, **__):
        raise TimeoutError("timed out")

    folder = open_folder(url)
    monkeypatch.setattr(buckets, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(type(system), "cat_file", unreachable)
    with pytest.raises(
        BadInput, match=rf"{url}/model-0000.-of-00002.safetensors: cannot be read \(timed out\)"
    ):
        load_params(folder, dtype=jnp.float32)
    monkeypatch.undo()
    system.put(str(source), "/bucket/orbax", recursive=True)
    for file in system.glob("/bucket/orbax/*.safetensors*"):
        system.rm(file)
    system.pipe_file("/bucket/orbax/params/x", b"")
    with pytest.raises(
        BadInput, match=r"memory://bucket/orbax: .*Orbax folders can be read on gs:// and s3:// alone"
    ):
        open_folder("memory://bucket/orbax")


def test_ranges_are_read_as_asked(remote):
    source, url = remote
    data = (source / "config.json").read_bytes()
    assert RemoteFiles(url).read("config.json", 3, 11) == data[3:11]
