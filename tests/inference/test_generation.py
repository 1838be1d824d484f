"""Generated tokens against `transformers`, and the rules of sampling against NumPy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babel_jax.config import Family, LayerType, ModelConfig
from babel_jax.errors import BadInput
from babel_jax.inference.decoding import extend, likely, prefill
from babel_jax.inference.generation import generate, padded_left
from tests.compiled import init_params, logits_alone

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen2": ModelConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3_sliding": ModelConfig(
        **SHAPE, family=Family.QWEN3, sliding_window=5, layer_types=(LayerType.FULL, LayerType.SLIDING)
    ),
    "llama": ModelConfig(**SHAPE, family=Family.LLAMA),
    "gemma2": ModelConfig(
        **SHAPE,
        family=Family.GEMMA2,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=9.0,
        sliding_window=6,
        layer_types=(LayerType.SLIDING, LayerType.FULL),
    ),
}
PROMPTS = [[5, 17, 3, 88, 41], [7], [60, 2, 2, 9, 31, 30, 29, 11, 54], [13, 12]]
NEW = 20


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(
    request: pytest.FixtureRequest, reference_model: Callable[..., Any], stacked_tree: Callable[..., Any]
) -> Any:
    config = CONFIGS[request.param]
    # With small weights every model repeats one token, and any cache would do.
    model = reference_model(config, std=0.3)
    return config, model, stacked_tree(dict(model.named_parameters()))


@pytest.fixture(scope="module")
def small() -> Any:
    config = CONFIGS["llama"]
    return config, jax.tree.map(lambda leaf: leaf * 8, init_params(config, jax.random.key(1)))


def generated_by_transformers(
    model: Any, prompts: list[list[int]], eos_id: int | None = None, **options: Any
) -> list[list[int]]:
    torch = pytest.importorskip("torch")
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        tokens,
        attention_mask=real,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos_id,
        use_cache=True,
        **options,
    )
    return out[:, longest:].tolist()


def test_greedy_tokens_of_one_prompt(pair: Any) -> None:
    config, model, params = pair
    for prompt in PROMPTS:
        expected = generated_by_transformers(model, [prompt])
        assert len(set(expected[0])) > 3
        assert generate(config, params, [prompt], NEW) == expected


def test_greedy_tokens_of_a_batch_with_left_padding(pair: Any) -> None:
    config, model, params = pair
    assert generate(config, params, PROMPTS, NEW) == generated_by_transformers(model, PROMPTS)


def test_greedy_tokens_behind_a_beginning_that_all_share(pair: Any) -> None:
    """The beginning is longer than the windows of attention, and computed once."""
    config, model, params = pair
    beginning = [60, 2, 2, 9, 31, 30, 29, 11, 54, 3, 44]
    tokens, padding = padded_left(PROMPTS, len(PROMPTS), 16)
    state = prefill(
        config, NEW, np.float32, params, np.array(beginning, np.int32), tokens, padding, len(PROMPTS)
    )
    state = extend(config, np.float32, params, state, padding, NEW, np.array([-1]), None)
    assert state.tokens.tolist() == generated_by_transformers(model, [beginning + own for own in PROMPTS])


def test_an_end_of_text_ends_its_own_row_alone(pair: Any) -> None:
    config, model, params = pair
    free = generate(config, params, PROMPTS, NEW)
    eos_id = free[0][3]
    ended = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert len(ended[0]) <= 4
    assert generate(config, params, PROMPTS, NEW, [eos_id]) == ended
    for row, theirs in zip(ended, generated_by_transformers(model, PROMPTS, eos_id), strict=True):
        assert theirs[: len(row)] == row


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_penalty_on_repetition_is_that_of_transformers(pair: Any, penalty: float) -> None:
    config, model, params = pair
    expected = generated_by_transformers(model, PROMPTS, repetition_penalty=penalty)
    assert expected != generated_by_transformers(model, PROMPTS)
    assert generate(config, params, PROMPTS, NEW, repetition_penalty=penalty) == expected


def test_the_cache_changes_nothing(small: Any) -> None:
    config, params = small
    prompt = PROMPTS[2]
    tokens = list(prompt)
    for _ in range(8):
        tokens.append(int(logits_alone(config, params, tokens)[-1].argmax()))
    assert generate(config, params, [prompt], 8) == [tokens[len(prompt) :]]


def test_draws_depend_on_the_seed_and_follow_the_distribution(small: Any) -> None:
    config, params = small
    prompt = PROMPTS[0]
    draw = [generate(config, params, [prompt] * 512, 1, temperature=10.0, seed=seed) for seed in (3, 3, 4)]
    assert draw[0] == draw[1] != draw[2]
    logits = logits_alone(config, params, prompt)[-1] / 10.0
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    counts = np.bincount([row[0] for row in draw[0] + draw[2]], minlength=config.vocab_size)
    # Total variation distance of 1,024 draws.
    assert 0.05 < expected.max() < 0.5
    assert 0.5 * np.abs(counts / counts.sum() - expected).sum() < 0.15
    assert generate(config, params, [prompt], 8, temperature=5.0, top_k=1) == generate(
        config, params, [prompt], 8
    )


@settings(max_examples=50)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True),
    top_k=st.integers(1, 6),
    top_p=st.floats(0.05, 1.0),
)
def test_top_k_and_top_p_keep_the_fewest_that_suffice(logits: list[int], top_k: int, top_p: float) -> None:
    values = np.array(logits, np.float32) / 10
    order = np.argsort(-values)[:top_k]
    probability = np.exp(values[order]) / np.exp(values[order]).sum()
    reached = np.cumsum(probability)
    if np.min(np.abs(reached - top_p)) < 1e-4:
        return  # rounding decides
    kept = order[: int(np.searchsorted(reached, top_p)) + 1]
    found = np.asarray(likely(jnp.asarray(values[None]), jnp.int32(top_k), jnp.float32(top_p)))[0]
    assert set(np.flatnonzero(np.isfinite(found))) == set(kept)
    np.testing.assert_array_equal(found[kept], values[kept])


@pytest.mark.parametrize(
    ("prompts", "new", "options", "words"),
    [
        ([[1], []], 4, {}, "prompt 1 is empty"),
        ([[97]], 4, {}, "0 to 96"),
        ([[1] * 40], 30, {}, "64 positions"),
        ([[1]], 4, {"temperature": -1.0}, "temperature"),
        ([[1]], 4, {"top_p": 0.0}, "top_p"),
        ([[1]], 4, {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[1]], 4, {"repetition_penalty": 1e308}, "repetition_penalty"),
    ],
)
def test_what_cannot_be_generated_is_said(
    small: Any, prompts: Any, new: int, options: Any, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        generate(*small, prompts, new, **options)


def test_no_new_tokens_and_no_prompts(small: Any) -> None:
    assert generate(*small, [[1], [2]], 0) == [[], []]
    assert generate(*small, [], 5) == []
