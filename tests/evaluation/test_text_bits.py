"""Sliding windows against a loop over every token."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.config import ModelConfig
from babel_jax.evaluation.bits_per_byte import scored_bits, sliding_windows, text_to_score
from babel_jax.evaluation.scoring import score
from babel_jax.training.mesh import make_mesh
from tests.compiled import forward, init_params


class Bytes:
    """A tokenizer whose tokens are bytes."""

    begin_ids = ()

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Begun(Bytes):
    """The same; every text begins with token 2."""

    begin_ids = (2,)


@given(st.integers(2, 200), st.integers(3, 50), st.integers(1, 2))
def test_every_token_but_the_first_ones_is_a_target_once(length, size, first):
    windows = sliding_windows(np.arange(length, dtype=np.int32), size, first)
    assert [token for window in windows for token in window.targets] == list(range(first, length))
    for number, window in enumerate(windows):
        assert len(window.tokens) <= size
        np.testing.assert_array_equal(window.tokens[-len(window.targets) :] + 1, window.targets)
        assert number == 0 or len(window.tokens) - len(window.targets) >= size // 2 - 1


def test_the_bits_of_a_long_document():
    config = ModelConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
    texts = {"sw": ["habari ya asubuhi", "maji ni uhai " * 4, "x"], "my": ["\u1000\u1001"]}

    def scored(windows):
        return score(config, params, windows, make_mesh({}), 512)

    found = scored_bits(text_to_score(Bytes(), texts, max_positions=16, max_bytes=1000), scored)
    # Of the first letter's three bytes, one is not predicted.
    assert found["my"].columns[:, 1].tolist() == [5]
    assert len(found["sw"].columns) == 2
    for row, text in zip(found["sw"].columns, texts["sw"], strict=False):
        ids, bits = np.frombuffer(text.encode(), np.uint8).astype(np.int32), 0.0
        for place in range(1, len(ids)):
            # The first window predicts the tokens 1 to 16, each later one 8 more, the last of them with 16
            # tokens before it.
            stop = 17 if place <= 16 else min(len(ids), 25 + 8 * ((place - 17) // 8))
            start = max(0, stop - 17)
            before = np.zeros(16, np.int32)
            before[: place - start] = ids[start:place]
            logits = np.asarray(forward(config, params, before[None]), np.float64)[0, place - start - 1]
            bits -= (logits[ids[place]] - np.log(np.exp(logits).sum())) / np.log(2)
        assert row[0] == pytest.approx(bits, rel=1e-5)
        assert row[1] == len(ids) - 1


def test_what_begins_every_text_is_read_and_not_counted():
    asked = []

    def scored(windows):
        asked.extend((window.tokens.tolist(), window.targets.tolist()) for window in windows)
        return [(-float(len(window.targets)), True) for window in windows]

    found = scored_bits(text_to_score(Begun(), {"sw": ["abcdef"]}, max_positions=4, max_bytes=1000), scored)
    assert asked[0] == ([2, 97, 98, 99], [98, 99, 100])
    assert [token for _, targets in asked for token in targets] == list(b"bcdef")
    assert found["sw"].columns[:, 1].tolist() == [5]
