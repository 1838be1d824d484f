"""A run in a bucket that extends its vocabulary: killed while it does so, and resumed by two processes that
share nothing else.
"""

import json

import pytest
from safetensors.numpy import load, load_file

from babel_jax.config import VocabularySettings
from babel_jax.model_folders.folder import open_folder
from babel_jax.recipe.recipe import run_recipe
from tests.training.test_processes import train

VOCABULARY = VocabularySettings(languages=("sw", "ha"), tokens=24, least=2, multiple=64)
OVERRIDES = ("training.mesh.fsdp=2", "evaluation.max_bytes=300")


def with_vocabulary(config, **data):
    """The config with the model's own tokenizer, which it extends."""
    data = config.data.model_copy(update={"tokenizer": None, **data})
    return config.model_copy(update={"vocabulary": VOCABULARY, "data": data})


@pytest.mark.slow
def test_a_vocabulary_grows_in_a_bucket(gcs, config_in, base, tmp_path):
    config = with_vocabulary(config_in(gcs, "gs://bucket"))
    config.save(tmp_path / "run.toml")
    # The first process is killed while it writes the extension; the folder in the bucket is not whole.
    ended = train(tmp_path / "run.toml", 2, 2, orders="KILL:0:extension", overrides=OVERRIDES)
    assert ended[0][0] == -9, ended[0][2][-3000:]
    assert "Traceback" not in ended[1][2]
    assert not [name for name in gcs.names("bucket", "data-vocabulary/") if "made_from" in name]
    ended = train(tmp_path / "run.toml", 2, 2, overrides=OVERRIDES)
    assert [status for status, *_ in ended] == [0, 0], "\n".join(errors[-2000:] for *_, errors in ended)
    found = json.loads(ended[0][1])
    assert list(found["bits_per_byte"])[:3] == ["base", "extended", "expanded"]

    # The same run on disk, by one process.
    there = with_vocabulary(config, folder=str(tmp_path / "data"))
    model = config.model.model_copy(update={"folder": base["hf"]})
    on_disk = run_recipe(there.model_copy(update={"out": str(tmp_path / "run"), "model": model}))
    shards = [name for name in gcs.names("bucket", "run/hf/") if name.endswith(".safetensors")]
    written = {name: value for shard in shards for name, value in load(gcs.read("bucket", shard)).items()}
    expected = load_file(f"{on_disk['hf']}/model.safetensors")
    assert written.keys() == expected.keys()
    assert all(abs(written[name] - expected[name]).max() < 1e-4 for name in expected)
    assert open_folder("gs://bucket/run/hf").hf_config["babel_vocabulary"]["tokens"] == 24
    left = ("babel-unfinished", "probe", "lease.json")
    assert not [name for name in gcs.names("bucket") if any(part in name for part in left)]
