"""The small configs run as they are, at a tiny size: the model, the text and the budgets are replaced."""

import json
from pathlib import Path

import pytest

from babel_jax.config.file import shipped_config
from babel_jax.recipe.recipe import run_recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "small-gpu", "small-tpu"])
def test_a_small_config_runs(name, base, small_settings, tmp_path):
    sources = json.loads(small_settings.model_dump_json(exclude_none=True, include={"sources"}))["sources"]
    made = {
        "out": str(tmp_path / "run"),
        "model": {"folder": base["hf"]},
        "data": {
            "folder": str(tmp_path / "data"),
            "sources": [source for source in sources if source["language"] in ("en", "sw", "ha")],
            "seq_len": 64,
            "heldout_fraction": 0.1,
            "workers": 1,
        },
        "evaluation": {"batch_size": 4, "max_bytes": 1000},
    }
    # A step of the config has 8 or 64 windows of 64 tokens here; two steps a stage.
    overrides = ("expansion.new_layers=1", "training.global_batch_size=4", "training.gradient_accumulation=2")
    overrides += tuple(f"stages.{stage}.tokens=512" for stage in (0, 1))
    # The rows of the small corpus are nearly the same.
    overrides += ("data.deduplication.near=false",)
    overrides += ("data.cleaning.off=['repetition', 'lines', 'paragraphs', 'language']",)
    config = shipped_config(f"{name}.toml", made, overrides)
    result = run_recipe(config)
    assert result["layers"] == 5
    assert set(result["bits_per_byte"]["continued"]) == {"en", "sw", "ha"}
    assert Path(result["hf"], "model.safetensors").is_file()
