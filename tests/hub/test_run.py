"""A run that begins with a model on the hub keeps the commit that it began with."""

import json
from pathlib import Path

import pytest

from babel_jax.config.file import load_config
from babel_jax.errors import BadInput
from babel_jax.hub import models
from babel_jax.recipe.recipe import run_recipe


def test_the_commit_of_a_run(hub, base, recipe_config, small_settings, small_model, tmp_path):
    sha = hub.put("me/base", Path(base["hf"]))
    config = recipe_config(tmp_path / "run", small_settings, small_model, {"folder": "me/base"})
    result = run_recipe(config)
    assert load_config(tmp_path / "run" / "config.toml").model.folder == f"me/base@{sha}"
    card = (Path(result["hf"]) / "README.md").read_text()
    assert "base_model: me/base\n" in card
    assert f"base_model_commit: {sha}\n" in card

    # The hub gets a newer commit: the run stays with its own, also before it is finished.
    hf_config = json.loads((Path(base["hf"]) / "config.json").read_text())
    files = {path.name: path.read_bytes() for path in Path(base["hf"]).iterdir()}
    hub.put("me/base", files | {"config.json": json.dumps(hf_config | {"new": 1})})
    models._commit.cache_clear()
    (tmp_path / "run" / "summary.json").unlink()
    assert run_recipe(config)["bits_per_byte"] == result["bits_per_byte"]
    newer = config.model_copy(update={"model": config.model.model_copy(update={"folder": "me/base@main"})})
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(BadInput, match=r"begun with another model\.folder"):
        run_recipe(newer)
