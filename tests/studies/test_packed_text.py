"""Packed windows against documents alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from babel_jax.config import ModelConfig
from babel_jax.studies.packed_text import encode
from tests.compiled import forward, init_params, logits_alone


class Bytes:
    """A tokenizer whose tokens are bytes."""

    vocab_size = 256
    begin_ids = ()

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Begun(Bytes):
    """The same; every text begins with token 2."""

    begin_ids = (2,)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return config, init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))


def bits_of(config, params, text):
    """The bits of all batches of one language's text: of each token that follows another of its segment and,
    with a mask, has 1 there.
    """
    bits = 0.0
    for tokens, segment_ids, *loss_mask in text.batches:
        logits = np.asarray(
            forward(config, params, jnp.asarray(tokens), segment_ids=jnp.asarray(segment_ids)), np.float64
        )[:, :-1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_targets = np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
        for mask in loss_mask:
            counts &= mask[:, 1:] > 0
        bits -= of_targets[counts].sum() / np.log(2)
    return bits


def alone(config, params, ids, first):
    """The bits of the tokens from the place `first` on of one document."""
    logits = logits_alone(config, params, ids)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -sum(log_p[place - 1, ids[place]] for place in range(first, len(ids))) / np.log(2)


@pytest.mark.parametrize("tokenizer", [Bytes(), Begun()])
def test_packed_windows_give_the_bits_of_documents_alone(model, tokenizer):
    texts = {"en": ["a short one", "another text", "x", ""], "sw": ["habari ya asubuhi"]}
    found = encode(tokenizer, texts, seq_len=32, batch_size=2)
    begin = tokenizer.begin_ids
    for language, documents in texts.items():
        expected = sum(
            alone(*model, [*begin, *text.encode()], len(begin) + 1) for text in documents if len(text) > 1
        )
        assert bits_of(*model, found[language]) == pytest.approx(expected, rel=1e-4)
        count = sum(max(0, len(text.encode()) - 1) for text in documents)
        assert (found[language].bytes, found[language].tokens) == (count, count)


def test_a_cut_document_counts_every_token_but_the_first_once(model):
    config, params = model
    text = encode(Bytes(), {"en": ["0123456789" * 20]}, seq_len=16, batch_size=4)["en"]
    assert text.tokens == 199
    assert bits_of(config, jax.tree.map(lambda leaf: leaf * 0, params), text) == pytest.approx(199 * 8)


def test_the_bytes_of_a_cut_first_character_are_counted_once():
    # A tokenizer of bytes cuts every Burmese letter in three; the first of them is not predicted, two are.
    texts = encode(Bytes(), {"my": ["\u1000\u1001", "ab"]}, seq_len=16, batch_size=1)
    assert (texts["my"].bytes, texts["my"].tokens) == (5 + 1, 5 + 1)
