"""A small model folder, to be put on the stand-in hub."""

import jax
import pytest

from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import save_folder
from tests.compiled import init_params


@pytest.fixture(scope="session")
def tiny_folder(tiny_config, small_model, tmp_path_factory):
    """A model folder of several safetensors files with an index, and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    files = tmp_path_factory.mktemp("tokenizer")
    tokenizer = open_tokenizer(small_model)
    tokenizer.save(files)
    config = tiny_config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    params = init_params(config, jax.random.key(0))
    hf_config = write_hf_config(config, eos_token_id=tokenizer.eos_id)
    save_folder(folder, Format.HF, params, hf_config, files, shard_bytes=300_000)
    return folder
