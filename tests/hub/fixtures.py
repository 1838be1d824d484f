"""The stand-in hub, empty at the start of each test, with a cache of the test's own."""

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants

from babel_jax import errors
from babel_jax.data.sources import streams
from babel_jax.hub import datasets, models, patience


@pytest.fixture(scope="session")
def hub_server(hub_port):
    """One server for all tests: clients keep the address that they saw first."""
    from tests.hub.stand_in import StandInHub

    server = StandInHub(listener=hub_port)
    yield server
    server.close()


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """The server without repositories. The cache, HF_TOKEN and the clients' memories are empty too."""
    monkeypatch.setenv("BABEL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    for memory in (models._commit, datasets.dataset_commit, datasets._listing, streams._on_server):
        memory.cache_clear()
    monkeypatch.setattr(patience, "_answered", False)
    monkeypatch.setattr(patience, "_FIRST_WAIT_SECONDS", 0.01)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    hub_server.reset()
    yield hub_server
    hub_server.reset()
    errors._SHOWN_AS.clear()
