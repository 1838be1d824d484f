"""The stand-in hub, empty at the start of each test, with a cache of the test's own."""

import fsspec
import huggingface_hub
import jax
import pytest
from huggingface_hub import constants

from babel_jax import errors
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.hub import models, patience
from babel_jax.model.decoder import init_params
from babel_jax.model_folders.folder import Format, save_folder
from babel_jax.model_folders.hf_config import write_hf_config
from tests.conftest import HUB_PORT
from tests.hub.stand_in import StandInHub


@pytest.fixture(scope="session")
def hub_server():
    """One server for all tests: clients keep the address that they saw first."""
    server = StandInHub(listener=HUB_PORT)
    yield server
    server.close()


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """The server without repositories. The cache, HF_TOKEN and the clients' memories are empty too."""
    monkeypatch.setenv("BABEL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    models._commit.cache_clear()
    monkeypatch.setattr(patience, "_answered", False)
    monkeypatch.setattr(patience, "_FIRST_WAIT_SECONDS", 0.01)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    hub_server.reset()
    yield hub_server
    hub_server.reset()
    errors._SHOWN_AS.clear()


@pytest.fixture(scope="session")
def tiny_folder(tiny_config, small_model, tmp_path_factory):
    """A model folder of several safetensors files with an index, and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    files = tmp_path_factory.mktemp("tokenizer")
    tokenizer = open_tokenizer(small_model)
    tokenizer.save(files)
    config = tiny_config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    hf_config = write_hf_config(config, eos_token_id=tokenizer.eos_id)
    save_folder(folder, Format.HF, params, hf_config, files, shard_bytes=300_000)
    return folder
