"""Bits per byte against torch on unpacked documents, and the table."""

import jax
import numpy as np
import pytest

from babel_jax.config import ModelConfig
from babel_jax.evaluation.bits_per_byte import bits_per_byte, class_means, encode
from babel_jax.evaluation.tables import findings, plot_points, points_table
from babel_jax.model.decoder import forward, init_params


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size = 256
    begin_ids = ()

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256
    )
    return config, init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))


def test_packed_windows_give_the_bits_of_documents_alone(model):
    config, params = model
    texts = {"en": ["a short one", "another text, a bit longer", "x", ""], "sw": ["habari ya asubuhi"]}
    found = bits_per_byte(config, params, encode(Bytes(), texts, seq_len=32, batch_size=2))
    for language, documents in texts.items():
        bits, count = 0.0, 0
        for text in documents:
            ids = np.array([list(text.encode())])
            if ids.shape[1] < 2:
                continue
            logits = np.asarray(forward(config, params, ids), np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            bits -= log_p[np.arange(ids.shape[1] - 1), ids[0, 1:]].sum() / np.log(2)
            count += ids.shape[1] - 1
        # Documents that the windows cut lose some context; in `en` the second one does.
        assert found[language].bits == pytest.approx(bits, rel=1e-4 if language == "sw" else 0.1)
        assert (found[language].bytes, found[language].tokens) == (count, count)


def test_a_cut_document_counts_every_token_but_the_first_once(model):
    config, params = model
    texts = encode(Bytes(), {"en": ["0123456789" * 20]}, seq_len=16, batch_size=4)
    found = bits_per_byte(config, params, texts)["en"]
    uniform = bits_per_byte(config, jax.tree.map(lambda leaf: leaf * 0, params), texts)["en"]
    assert found.tokens == 199
    assert uniform.bits == pytest.approx(199 * 8)


def test_the_bytes_of_a_cut_first_character_are_counted_once():
    # A tokenizer of bytes cuts every Burmese letter in three; the first of them is not predicted, two are.
    texts = encode(Bytes(), {"my": ["\u1000\u1001", "ab"]}, seq_len=16, batch_size=1)
    assert (texts["my"].bytes, texts["my"].tokens) == (5 + 1, 5 + 1)


def test_nothing_is_claimed_of_nothing():
    assert findings({"base": {}, "expanded": {}, "recovered": {}}) == []


def test_means_and_table():
    values = {"en": 1.0, "zh": 2.0, "sw": 6.0}
    assert class_means(values) == {"all": 3.0, "high": 1.5, "low": 6.0}
    table = points_table({"base": values, "continued": {"en": 1.1, "zh": 2.0, "sw": 3.0}})
    assert "| Swahili (sw) | low | 6.000 | 3.000 | -50.0% |" in table
    assert "| **mean, high-resource** |  | 1.500 | 1.550 | +3.3% |" in table


def test_the_plot_is_a_picture(tmp_path):
    plot_points(tmp_path / "plot.png", {"base": {"en": 1.0}, "expanded": {"en": 1.1}}, {"recovery": [(0, 3.0), (1, 2.5)]})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
