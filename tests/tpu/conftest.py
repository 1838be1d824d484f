"""A config whose programs compile in seconds."""

import pytest


@pytest.fixture
def tiny_toml(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(
        """
        out = "run"
        prices = { v5e = 2.0 }
        [model.shape]
        vocab_size = 512
        hidden_size = 256
        intermediate_size = 512
        num_hidden_layers = 3
        num_attention_heads = 2
        head_dim = 128
        [data]
        folder = "data"
        seq_len = 256
        [training]
        global_batch_size = 4
        remat = "full"
        [[stages]]
        name = "one"
        tokens = 1_000_000_000
        schedule = { peak = 1e-3 }
        """
    )
    return path
