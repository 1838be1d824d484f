"""Buckets of the test servers, to which all clients in this process are pointed, and a scratch space of the
test's own.
"""

from pathlib import Path

import fsspec
import pytest

from babel_jax import buckets, errors, places
from babel_jax.recipe.recipe import run_recipe
from tests.buckets.gcs_server import GcsServer
from tests.buckets.s3_server import S3Server

EXPANSION = {"insert_after": [1, 3], "init": "zero"}


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("BABEL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(buckets, "_FIRST_WAIT_SECONDS", 0.05)
    yield tmp_path / "scratch"
    forget()


def _started(kind):
    """The clients of a process keep the address that they saw first, so there is one server of each kind."""
    server = kind()
    with pytest.MonkeyPatch.context() as changed:
        for name, value in server.environment.items():
            changed.setenv(name, value)
        fsspec.get_filesystem_class("gs" if kind is GcsServer else "s3").clear_instance_cache()
        yield server
    server.close()


@pytest.fixture(scope="session")
def gcs_server():
    yield from _started(GcsServer)


@pytest.fixture(scope="session")
def s3_server():
    yield from _started(S3Server)


@pytest.fixture
def gcs(gcs_server, scratch):
    """The server of GCS, with an empty bucket "bucket"."""
    gcs_server.reset()
    yield gcs_server
    gcs_server.reset()


@pytest.fixture
def s3(s3_server, scratch):
    """The server of S3, with an empty bucket "bucket"."""
    s3_server.reset()
    return s3_server


def forget():
    """Takes the working copies from this process, as its end would; what is in them
    stays, as after a kill.
    """
    for copy in places.COPIES.values():
        copy.lock.close()
    places.COPIES.clear()
    errors._SHOWN_AS.clear()


@pytest.fixture
def anew():
    """`forget`."""
    return forget


@pytest.fixture(scope="session")
def on_disk(recipe_config, small_settings, small_prepared, small_model, base, tmp_path_factory):
    """The run that those in buckets are compared with."""
    out = tmp_path_factory.mktemp("on_disk") / "run"
    return run_recipe(
        recipe_config(out, small_settings, small_model, {"folder": base["hf"]}, expansion=EXPANSION)
    )


@pytest.fixture
def config_in(recipe_config, small_settings, small_model, base):
    """The config of the same run with all its folders below a URL."""

    def make(server, url, **changes):
        server.put_folder(Path(base["hf"]), f"{url}/models/base")
        settings = small_settings.model_copy(update={"folder": f"{url}/data"})
        return recipe_config(
            f"{url}/run",
            settings,
            small_model,
            {"folder": f"{url}/models/base"},
            expansion=EXPANSION,
            **changes,
        )

    return make
