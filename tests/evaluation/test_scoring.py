"""Rows of prefix trees against each sequence alone."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babel_jax.config import Family, LayerType, ModelConfig
from babel_jax.evaluation.prefix_trees import Scored, planned_rows
from babel_jax.evaluation.scoring import score
from babel_jax.inference.generation import generate
from babel_jax.studies.packed_text import encode
from babel_jax.studies.sensitivity import sensitivity
from babel_jax.training.mesh import make_mesh
from tests.compiled import init_params, logits_alone
from tests.forced_devices import forced_devices
from tests.studies.test_packed_text import Bytes

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "qwen2": ModelConfig(**SHAPE, num_key_value_heads=2),
    "gemma2": ModelConfig(
        **SHAPE,
        num_key_value_heads=4,
        family=Family.GEMMA2,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=9.0,
        sliding_window=6,
        layer_types=(LayerType.SLIDING, LayerType.FULL),
    ),
}


# Eight devices; every axis is over 1 in some mesh of each family, and the ring beside each other axis.
MESHES = {
    "qwen2": [
        {"fsdp": 2, "ring": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 4, "ring": 2},
        {"fsdp": 4, "ring": 2, "context": 2},
        {"context": 8},
    ],
    "gemma2": [{"fsdp": 4, "ring": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}],
}
PROMPTS = [[5, 6, 7], [60], [9] * 12, [1, 2, 3, 4]]
SAMPLED = [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.3}]


def encoded_texts():
    """A window of two documents and one of a part of the longest, of one language each."""

    class Tokens(Bytes):
        def encode_batch(self, texts):
            return [[byte % 61 for byte in text.encode()] for text in texts]

    return encode(
        Tokens(),
        {"en": ["a short one", "another text, a bit longer"], "sw": ["habari ya asubuhi"]},
        seq_len=24,
        batch_size=2,
    )


def random_sequences(random, number):
    """Questions of a few examples, with choices; some the same, some of one token, some that share nothing,
    some scored as a whole.
    """
    examples = [random.integers(0, 61, size) for size in random.integers(1, 60, 3)]
    sequences = []
    for _ in range(number):
        context = np.concatenate(
            [examples[random.integers(3)], random.integers(0, 61, random.integers(0, 20))]
        )
        for _ in range(random.integers(1, 5)):
            choice = random.integers(0, 61, random.integers(1, 9))
            whole = np.concatenate([context, choice])
            scored = len(choice) if random.random() < 0.7 else random.integers(1, len(whole))
            sequences.append(Scored(whole[:-1].astype(np.int32), whole[-scored:].astype(np.int32)))
    return sequences


def alone(config, params, sequence):
    logits = logits_alone(config, params, sequence.tokens)[-len(sequence.targets) :]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = log_p[np.arange(len(sequence.targets)), sequence.targets]
    return taken.sum(), bool((logits.argmax(-1) == sequence.targets).all())


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_each_sequence_alone(family):
    config = CONFIGS[family]
    params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
    sequences = random_sequences(np.random.default_rng(0), 14)
    told = {}
    found = score(config, params, sequences, make_mesh({}), 512, done=told.update)
    assert told == dict(enumerate(found))
    for sequence, (log_p, greedy) in zip(sequences, found, strict=True):
        expected, likeliest = alone(config, params, sequence)
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest


@given(st.integers(0, 10_000), st.integers(1, 30))
@settings(max_examples=60)
def test_every_token_sees_its_own_branch_and_nothing_else(seed, number):
    sequences = random_sequences(np.random.default_rng(seed), number)
    planned = planned_rows(sequences, (128, 256), lambda rows, length: rows * length)
    seen = []
    for length, rows in planned.items():
        for row in rows:
            assert row.tokens.shape == row.ends.shape == (length,)
            assert (
                len(
                    {
                        *zip(
                            row.places[: row.entries].tolist(),
                            row.targets[: row.entries].tolist(),
                            strict=True,
                        )
                    }
                )
                == row.entries
            )
            for owner, own in row.owners:
                sequence = sequences[owner]
                last = row.places[own[-1]]
                above = [place for place in range(last + 1) if row.ends[place] > last]
                np.testing.assert_array_equal(row.tokens[above], sequence.tokens)
                np.testing.assert_array_equal(row.positions[above], np.arange(len(above)))
                np.testing.assert_array_equal(row.places[own], above[-len(own) :])
                np.testing.assert_array_equal(row.targets[own], sequence.targets)
                seen.append(owner)
    assert sorted(seen) == list(range(len(sequences)))


def test_a_shared_prefix_is_there_once():
    context = np.arange(100, dtype=np.int32)
    ends = [np.append(context, [200 + choice, 300]).astype(np.int32) for choice in range(4)]
    sequences = [Scored(end[:-1], end[-2:]) for end in ends]
    (rows,) = planned_rows(sequences, (128, 256), lambda rows, length: rows * length).values()
    assert len(rows) == 1
    assert np.count_nonzero(rows[0].tokens) == 99 + 4


def test_what_choices_are_scored_on_together_is_scored_once():
    premise = np.arange(1, 60, dtype=np.int32)
    wholes = [np.append(premise, [200 + choice, 300, 301]).astype(np.int32) for choice in range(3)]
    (rows,) = planned_rows(
        [Scored(whole[:-1], whole[1:]) for whole in wholes], (128, 256), lambda rows, length: rows * length
    ).values()
    assert len(rows) == 1
    assert rows[0].entries == 58 + 3 * 3


@pytest.mark.slow
def test_scores_continuations_and_sensitivities_are_the_same_on_every_mesh():
    command = [sys.executable, "-m", "tests.evaluation.score_on_meshes"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        command, env=forced_devices(8), cwd=root, capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    seen = [
        json.loads(line.removeprefix("SEEN "))
        for line in ended.stdout.splitlines()
        if line.startswith("SEEN ")
    ]
    assert len(seen) == sum(map(len, MESHES.values()))
    sequences = random_sequences(np.random.default_rng(0), 14)
    for family, config in CONFIGS.items():
        params = init_params(config.model_copy(update={"initializer_range": 0.3}), jax.random.key(0))
        expected_scores = [alone(config, params, sequence) for sequence in sequences]
        # These are compared with transformers elsewhere, on one device.
        expected_tokens = [generate(config, params, PROMPTS, 8, **sampling) for sampling in SAMPLED]
        by_layer = dataclasses.asdict(sensitivity(config, params, encoded_texts(), make_mesh({})))
        for _, sizes, scores, written, found in [one for one in seen if one[0] == family]:
            for sequence, (log_p, greedy), (expected, likeliest) in zip(
                sequences, scores, expected_scores, strict=True
            ):
                assert log_p == pytest.approx(expected, abs=1e-5 * len(sequence.targets), rel=0), sizes
                assert greedy == likeliest
            if sizes != MESHES[family][0]:
                continue
            assert written == expected_tokens, sizes
            for name, values in by_layer.items():
                np.testing.assert_allclose(
                    _numbers(found[name]), _numbers(values), rtol=1e-5, err_msg=str(sizes)
                )


def _numbers(values):
    layers = values if isinstance(values, list) else [values]
    return [value for by_language in layers for value in by_language.values()]


def test_of_equally_likely_tokens_the_first_is_the_likeliest():
    config = CONFIGS["qwen2"]
    params = jax.tree.map(lambda leaf: leaf * 0, init_params(config, jax.random.key(0)))
    sequences = [Scored(np.array([5, 6], np.int32), np.array([target], np.int32)) for target in (0, 1)]
    found = score(config, params, sequences, make_mesh({}), 512)
    assert [greedy for _, greedy in found] == [True, False]
    assert [log_p for log_p, _ in found] == pytest.approx([-np.log(64)] * 2, abs=1e-6)
