"""The stand-in hub, empty at the start of each test, with a cache of the test's own."""

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants

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
    huggingface_hub.HfFileSystem.clear_instance_cache()
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    hub_server.reset()
    yield hub_server
    hub_server.reset()
